"""Which files of a folder are documents: what `datasets` saved, and what only describes the data, told apart.

A folder that `Dataset.save_to_disk` wrote names its Arrow files in `state.json`; one of several splits (`DatasetDict`)
names them in `dataset_dict.json`, and the source's `split` is read, as for a data set on the hub. A folder of data in the
hub's manner has a card, licences and the like beside its files; a folder of somebody's own texts has none of it, and there
a `README.md` is a document.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from numpy.typing import ArrayLike, NDArray

from layerplan.config.corpus import SourceConfig
from layerplan.corpus.file_table import NAMES_TOLD, FileTable, LeftOut
from layerplan.corpus.location import open_stream
from layerplan.corpus.unit import READERS
from layerplan.errors import CorpusError
from layerplan.storage.address import hide_keys, split_options

STATE, SPLITS = "state.json", "dataset_dict.json"
RECORDS = ("dataset_info.json", "dataset_infos.json", STATE, SPLITS)
"""What `datasets` keeps about a data set (`datasets.config`)."""
MAX_CARD_BYTES = 2**24
CARD_FIELDS = {
    *("configs", "dataset_info", "task_categories", "task_ids", "size_categories", "source_datasets", "config_names"),
    *("annotations_creators", "language_creators", "multilinguality", "train-eval-index", "paperswithcode_id"),
}
"""Fields that only the card of a data set has (`huggingface_hub.DatasetCardData`)."""
_ABOUT = re.compile(r"(?:readme|licen[cs]e|notice|copying|citation|contributing|authors|changelog)\b", re.IGNORECASE)
_TABLE = re.compile(r".\.(?:jsonl|ndjson|parquet|arrow)(?:\.gz|\.zst)?$", re.IGNORECASE)
"""Endings of files of many records: `authors.jsonl` is documents about authors, and says nothing of who wrote the rest."""
_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


class Layout:
    """The files to read, in order, and those that are not, by the reason.

    Attributes:
        files: All files that there are.
        order: (m,), places in `files` of those to read.
        left_out: What is not read, by the reason.
    """

    def __init__(self, files: FileTable) -> None:
        self.files = files
        self.order: NDArray[np.int64] = np.arange(len(files))
        self.left_out: dict[str, LeftOut] = {}

    def leave_out(self, why: str, places: ArrayLike) -> None:
        """Takes files away, by their places among all, and remembers why."""
        is_gone = np.zeros(len(self.files), dtype=bool)
        is_gone[np.asarray(places, dtype=np.int64)] = True
        gone = self.order[is_gone[self.order]]
        told = self.left_out.setdefault(why, LeftOut())
        told.count += len(gone)
        told.names += [_name(self.files.name_at(place)) for place in gone[: NAMES_TOLD - len(told.names)].tolist()]
        self.order = self.order[~is_gone[self.order]]

    def explain(self) -> str | None:
        """One line with the number of files that are not read, or None when all are."""
        found = [*self.left_out.items(), *self.files.left_out.items()]
        parts = [f"{told.count} {why} ({told})" for why, told in found if told.count]
        return f"reads {len(self.order)} files; not read: {'; '.join(parts)}" if parts else None

    def keep(self, places: list[int]) -> list[int]:
        """Of some places, those of files that are to be read."""
        is_read = np.zeros(len(self.files), dtype=bool)
        is_read[self.order] = True
        return [place for place in places if is_read[place]]


@dataclass
class _Special:
    """Places of the files whose names mean something."""

    splits: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    about: list[int] = field(default_factory=list)


def choose_files(source: SourceConfig, files: FileTable, formats: NDArray[np.int8]) -> Layout:
    """Tells documents from the rest.

    Args:
        source: Where the files are from; a file that is named by itself is read whatever it is called.
        files: All files below its path.
        formats: (n,), of each file by its ending; below 0 where nothing here reads it.

    Raises:
        CorpusError: When a saved data set lacks a file or the split that is wanted.
    """
    layout = Layout(files)
    if len(files) == 1 and _name(files.make_path(files.name_at(0))) == _name(source.path):
        return layout
    special = _find_special(files)
    for record in special.splits:
        _take_split(layout, source, record)
    for state in layout.keep(special.states):
        _order_saved(layout, state)
    layout.leave_out("that describe the data", special.records)
    if source.format != "text" and _is_data_set(layout, formats, layout.keep(special.about)):
        layout.leave_out("that describe the data", special.about)
    layout.leave_out("of no known format", np.flatnonzero(formats < 0))
    return layout


def _find_special(files: FileTable) -> _Special:
    special = _Special()
    for place, path in enumerate(files.iter_names()):
        name = _name(path)
        if name in RECORDS:
            special.records.append(place)
            if name == SPLITS:
                special.splits.append(place)
            elif name == STATE:
                special.states.append(place)
        elif _ABOUT.match(name) and not _TABLE.search(name):
            special.about.append(place)
    return special


def _take_split(layout: Layout, source: SourceConfig, record: int) -> None:
    """Of a saved `DatasetDict`, the wanted split alone."""
    name = layout.files.name_at(record)
    splits = _read_json(layout.files.make_path(name)).get("splits")
    if not isinstance(splits, list):
        return
    if source.split not in splits:
        have = ", ".join(map(str, splits))
        raise CorpusError(f"{source.path}: has no split {source.split!r}; set the source's split to one of {have}")
    for split in splits:
        if split != source.split:
            layout.leave_out("of other splits", _find_below(layout.files, f"{_folder(name)}{split}/"))


def _order_saved(layout: Layout, state: int) -> None:
    """The Arrow files of one saved data set in the order its state names; nothing else of its folder."""
    files, name = layout.files, layout.files.name_at(state)
    folder, path = _folder(name), files.make_path(name)
    values = _read_json(path)
    named = values.get("_data_files")
    if not isinstance(named, list):
        return
    if values.get("_indices_data_files"):
        raise CorpusError(f"{path}: the data set was saved with indices; save it again after flatten_indices()")
    is_inside = np.zeros(len(files), dtype=bool)
    below = _find_below(files, folder)
    is_inside[[place for place in below.tolist() if _folder(files.name_at(place)) == folder]] = True
    inside = {_name(files.name_at(place)): place for place in layout.order[is_inside[layout.order]].tolist()}
    names = [item["filename"] for item in named]
    missing = [name for name in names if name not in inside]
    if missing:
        raise CorpusError(f"{path}: names {missing[0]}, which is not there; save or copy the data set again")
    first = int(np.flatnonzero(is_inside[layout.order])[0])
    layout.leave_out("that describe the data", [place for name, place in inside.items() if name not in names])
    rest = layout.order[~is_inside[layout.order]]
    layout.order = np.concatenate([rest[:first], np.array([inside[name] for name in names], np.int64), rest[first:]])


def _find_below(files: FileTable, folder: str) -> NDArray[np.int64]:
    """Places of the files below a folder, at any depth."""
    if not folder:
        return np.arange(len(files))
    return np.flatnonzero(pc.starts_with(files.names, pattern=folder).to_numpy(zero_copy_only=False))


def _is_data_set(layout: Layout, formats: NDArray[np.int8], about: list[int]) -> bool:
    """Records beside no text but what is about them, or a data set's card."""
    is_own = np.ones(len(formats), dtype=bool)
    is_own[about] = False
    kinds = {READERS[code] for code in np.unique(formats[layout.order[is_own[layout.order]]]).tolist() if code >= 0}
    if kinds & {"jsonl", "parquet", "arrow"} and "text" not in kinds:
        return True
    names = [layout.files.name_at(place) for place in about]
    cards = [name for name in names if _name(name).lower() == "readme.md"]
    return bool(cards) and _is_card(layout.files.make_path(min(cards, key=lambda name: (name.count("/"), name))))


def _is_card(path: str) -> bool:
    found = _FRONT_MATTER.match(_read_head(path).decode("utf-8", "replace"))
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return False
    return isinstance(values, dict) and not CARD_FIELDS.isdisjoint(values)


def _read_json(path: str) -> dict[str, Any]:
    """A small JSON object; anything else is no record of a data set."""
    try:
        values = json.loads(_read_head(path))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _read_head(path: str) -> bytes:
    try:
        with open_stream(path) as stream:
            return stream.read(MAX_CARD_BYTES)
    except OSError as error:
        raise CorpusError(f"{hide_keys(path)}: cannot be read ({error})") from None


def _name(path: str) -> str:
    return split_options(path)[0].rstrip("/").rpartition("/")[2]


def _folder(name: str) -> str:
    """The folder of a name with its slash; nothing for the topmost."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash
