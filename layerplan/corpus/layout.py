"""Which files of a folder are documents: what `datasets` saved, and what only describes the data, told apart.

A folder that `Dataset.save_to_disk` wrote names its Arrow files in `state.json`; one of several splits (`DatasetDict`)
names them in `dataset_dict.json`, and the source's `split` is read, as for a data set on the hub. A folder of data in the
hub's manner has a card, licences and the like beside its files; a folder of somebody's own texts has none of it, and there
a `README.md` is a document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from layerplan.config.corpus import SourceConfig
from layerplan.corpus.location import FileEntry, open_stream
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
_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
NAMES_TOLD = 5


@dataclass
class Layout:
    """The files to read, in order, and those that are not, by the reason."""

    files: list[FileEntry]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, why: str, files: Iterable[FileEntry]) -> None:
        """Takes files away and remembers why."""
        gone = set(files)
        self.left_out.setdefault(why, []).extend(_name(file.path) for file in self.files if file in gone)
        self.files = [file for file in self.files if file not in gone]

    def explain(self) -> str | None:
        """One line with the number of files that are not read, or None when all are."""
        parts = [f"{len(names)} {why} ({_list_names(names)})" for why, names in self.left_out.items() if names]
        return f"reads {len(self.files)} files; not read: {'; '.join(parts)}" if parts else None


def choose_files(source: SourceConfig, files: Sequence[FileEntry], formats: Sequence[str | None]) -> Layout:
    """Tells documents from the rest.

    Args:
        source: Where the files are from; a file that is named by itself is read whatever it is called.
        files: All files below its path.
        formats: Of each file, by its ending; None where nothing here reads it.

    Raises:
        CorpusError: When a saved data set lacks a file or the split that is wanted.
    """
    layout = Layout(list(files))
    if len(files) == 1 and _name(files[0].path) == _name(source.path):
        return layout
    _take_split(layout, source)
    for state in [file for file in layout.files if _name(file.path) == STATE]:
        _order_saved(layout, state)
    layout.leave_out("that describe the data", [file for file in layout.files if _name(file.path) in RECORDS])
    format_of = {file.path: name for file, name in zip(files, formats, strict=True)}
    if source.format != "text" and _is_data_set(layout.files, format_of):
        about = [file for file in layout.files if _ABOUT.match(_name(file.path))]
        layout.leave_out("that describe the data", about)
    layout.leave_out("of no known format", [file for file in layout.files if format_of[file.path] is None])
    return layout


def _take_split(layout: Layout, source: SourceConfig) -> None:
    """Of every saved `DatasetDict`, the wanted split alone."""
    for record in [file for file in layout.files if _name(file.path) == SPLITS]:
        splits = _read_json(record).get("splits")
        if not isinstance(splits, list):
            continue
        if source.split not in splits:
            have = ", ".join(map(str, splits))
            raise CorpusError(f"{source.path}: has no split {source.split!r}; set the source's split to one of {have}")
        folder = _folder(record.path)
        others = tuple(f"{folder}/{split}/" for split in splits if split != source.split)
        gone = [file for file in layout.files if file.path.startswith(others)]
        layout.leave_out("of other splits", gone)


def _order_saved(layout: Layout, state: FileEntry) -> None:
    """The Arrow files of one saved data set in the order its state names; nothing else of its folder."""
    values = _read_json(state)
    named = values.get("_data_files")
    if not isinstance(named, list):
        return
    if values.get("_indices_data_files"):
        raise CorpusError(f"{state.path}: the data set was saved with indices; save it again after flatten_indices()")
    folder = _folder(state.path)
    inside = {_name(file.path): file for file in layout.files if _folder(file.path) == folder}
    names = [item["filename"] for item in named]
    missing = [name for name in names if name not in inside]
    if missing:
        raise CorpusError(f"{state.path}: names {missing[0]}, which is not there; save or copy the data set again")
    place = min(layout.files.index(file) for file in inside.values())
    layout.leave_out("that describe the data", [file for name, file in inside.items() if name not in names])
    rest = [file for file in layout.files if _folder(file.path) != folder]
    layout.files = rest[:place] + [inside[name] for name in names] + rest[place:]


def _is_data_set(files: Sequence[FileEntry], format_of: dict[str, str | None]) -> bool:
    """Records beside no text but what is about them, or a data set's card."""
    own = [file for file in files if not _ABOUT.match(_name(file.path))]
    kinds = {format_of[file.path] for file in own}
    if kinds & {"jsonl", "parquet", "arrow"} and "text" not in kinds:
        return True
    cards = [file for file in files if _name(file.path).lower() == "readme.md"]
    return bool(cards) and _is_card(min(cards, key=lambda file: (file.path.count("/"), file.path)).path)


def _is_card(path: str) -> bool:
    found = _FRONT_MATTER.match(_read_head(path).decode("utf-8", "replace"))
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return False
    return isinstance(values, dict) and not CARD_FIELDS.isdisjoint(values)


def _read_json(file: FileEntry) -> dict[str, Any]:
    """A small JSON object; anything else is no record of a data set."""
    try:
        values = json.loads(_read_head(file.path))
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


def _folder(path: str) -> str:
    return split_options(path)[0].rpartition("/")[0]


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more
