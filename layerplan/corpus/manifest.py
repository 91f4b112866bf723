"""The manifest of a token store: what is in it, where it came from, and what was left out and why."""

from __future__ import annotations

import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import xxhash
from pydantic import Field, ValidationError

from layerplan.artifacts import compute_sha256
from layerplan.config.base import StrictModel, describe_fault
from layerplan.corpus.consistency import find_contradiction
from layerplan.corpus.damage import explain_file
from layerplan.corpus.location import open_file, open_filesystem
from layerplan.corpus.row_groups import HASH_CHARS
from layerplan.errors import CorpusError
from layerplan.run_folder import MANIFEST_NAME, VALIDATION_NAME
from layerplan.storage.address import hide_keys, is_address, join_location

SEAL_KEY = "rest_xxh3_128"
"""First entry of a manifest's file: the hash of all bytes after it."""
SETTLED_S = 1
"""A file written since may be written again at what a disk calls the same time."""
_SEAL = re.compile(rb'\{\s*"' + SEAL_KEY.encode() + rb'": "([0-9a-f]{32})",')


class Shard(StrictModel):
    """One Parquet file of rows."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """File name below the store."""
    num_rows: int = Field(ge=1)
    """Rows in it."""
    num_tokens: int = Field(ge=0)
    """Tokens in it, padding left out."""
    sha256: str
    """Hash of the file."""
    num_bytes: int | None = None
    """Size of the file; this and what follows is not known of stores of earlier versions."""
    tail_xxh3_128: str = Field(default="", pattern="^([0-9a-f]{32})?$")
    """Hash of its last 64 KiB, where Parquet keeps what says how to read the rest."""
    max_id: int | None = None
    """Highest token id in it."""
    groups_xxh3_128: str = Field(default="", pattern="^[0-9a-f]*$")
    """Hashes of its row groups' rows, 32 digits each, one after the other."""

    def get_group_hash(self, group: int) -> str | None:
        """The hash of one row group, or None when nobody took it."""
        return self.groups_xxh3_128[group * HASH_CHARS : (group + 1) * HASH_CHARS] or None


class SourceRows(StrictModel):
    """The rows of one source: a run of row ids, in shards of their own."""

    path: str
    """As in the config."""
    weight: float | None
    """Share in the mixture, relative to the others'; None reads every row once per epoch."""
    num_rows: int
    """Training rows."""
    num_tokens: int
    """Tokens in them, padding left out."""
    num_padding_tokens: int
    """Padding of the source's last row."""
    num_validation_rows: int
    """Rows held out."""
    num_validation_tokens: int
    """Tokens in those, padding left out."""
    counts: dict[str, int]
    """Documents: `in`, `kept`, `duplicate`, `contaminated`, `quarantined`, `filtered/<reason>`."""
    num_control_documents: int | None = None
    """Kept documents that spell out a control token; None where nobody counted."""
    num_control_tokens: int | None = None
    """Control tokens spelled out in them."""


class LabelFacts(StrictModel):
    """What makes a store one of prompts with a label: the last token of each row is the label, and only it is learned."""

    task: str
    """Name of the task."""
    task_sha256: str
    """Hash of its prompts, labels and splits."""
    label_ids: dict[str, int]
    """Token of each class."""
    start_layers: list[int]
    """Decoder layer that each training row's backward pass ends at, by row id."""
    order: Literal["shallow_first", "drawn"] = "shallow_first"
    """Order of an epoch's rows."""

    def hashed(self) -> dict[str, Any]:
        """What decides the order of tokens; the default order is left out, as before there was another."""
        return self.model_dump(mode="json", exclude={"order"} if self.order == "shallow_first" else None)


class Manifest(StrictModel):
    """Everything a reader of the store must know; written last, so a store without it is incomplete."""

    schema_version: Literal[2] = 2
    """Version of this layout."""
    mode: Literal["store", "on_the_fly"] = "store"
    """`on_the_fly`: no rows are stored, `stream.json` says how to make them."""
    seq_len: int
    """Tokens per row."""
    rows_per_group: int
    """Rows in every row group but a source's last."""
    num_rows: int
    """Training rows; ids 0..num_rows-1, source after source."""
    num_validation_rows: int
    """Held-out rows."""
    num_tokens: int
    """Tokens in training rows, padding left out."""
    num_padding_tokens: int
    """Padding of the sources' last rows."""
    vocab_size: int
    """One more than the highest id that the documents can yield; stores of earlier versions: entries of the tokenizer."""
    end_of_text_id: int
    """Token that ends each document."""
    end_of_text: str = ""
    """Its name."""
    begin_ids: list[int] = Field(default_factory=list)
    """Tokens that begin each document."""
    control_tokens: Literal["text", "token", "unknown"] = "unknown"
    """What a control token spelled out in a document became; `unknown` in stores of earlier versions: the token."""
    num_control_documents: int | None = None
    """Kept documents that spell out a control token; None where nobody counted."""
    num_control_tokens: int | None = None
    """Control tokens spelled out in them."""
    tokenizer_sha256: str
    """Hash of `tokenizer.json`."""
    config_sha256: str
    """Hash of the corpus config and of the benchmark questions."""
    held_out_sha256: str = ""
    """Hash of the held-out documents that were looked for; empty when there was none."""
    files_sha256: str = ""
    """Hash of the names and sizes of the sources' files; empty in stores of earlier versions, and where no rows are stored."""
    counts: dict[str, int]
    """Documents of all sources; `in` is the sum of the rest."""
    num_questions: int = 0
    """Benchmark questions and held-out documents that were looked for."""
    num_questions_too_short: int = 0
    """Of these, shorter than one n-gram: they cannot be looked for."""
    sources: list[SourceRows]
    """Sources in row order."""
    shards: list[Shard]
    """Shards in row order."""
    validation: Shard | None = None
    """The file of held-out rows; None where there are none, and in stores of earlier versions."""

    labels: LabelFacts | None = None
    """Of a store of prompts with a label; None where every token is learned."""

    @property
    def held_out(self) -> Shard | None:
        """The file of held-out rows; of an earlier version's store, what is known of it."""
        if self.validation is not None or self.num_validation_rows == 0:
            return self.validation
        return Shard(name=VALIDATION_NAME, num_rows=self.num_validation_rows, num_tokens=0, sha256="")

    @property
    def files(self) -> list[Shard]:
        """Every file of rows."""
        held_out = self.held_out
        return [*self.shards, *([] if held_out is None else [held_out])]

    @property
    def is_hashed(self) -> bool:
        """Whether every row that is read can be compared with the one that was written."""
        return all(shard.groups_xxh3_128 for shard in self.files)

    @property
    def max_id(self) -> int | None:
        """The highest token id of all rows; None where a store of an earlier version does not say."""
        ids = [shard.max_id for shard in self.files]
        return None if None in ids else max((known for known in ids if known is not None), default=None)

    def count_group_rows(self, shard: Shard, group: int) -> int:
        """Rows in a row group: all groups of a file are full but its last."""
        return min(self.rows_per_group, shard.num_rows - group * self.rows_per_group)

    @property
    def content_sha256(self) -> str:
        """One hash for all that decides the order of tokens: the shards' hashes, the sources' rows and weights."""
        fields: dict[str, Any] = self.model_dump(
            mode="json",
            include={
                **dict.fromkeys(("mode", "seq_len", "rows_per_group", "num_rows", "config_sha256"), True),
                "shards": {"__all__": {"name", "num_rows", "num_tokens", "sha256"}},
            },
        )
        if self.mode == "store":
            fields.pop("config_sha256")
        elif self.control_tokens != "unknown":
            fields |= {"joining": [self.end_of_text_id, self.begin_ids, self.control_tokens]}
        if self.labels is not None:
            fields |= {"labels": self.labels.hashed()}
        return compute_sha256(fields | {"sources": [[source.num_rows, source.weight] for source in self.sources]})

    @classmethod
    def load(cls, store: Path | str) -> Manifest:
        """Opens the manifest of a store: read, proved and parsed once in a process, and again when the file has changed.

        Raises:
            CorpusError: When the store is missing or incomplete, or its manifest malformed, changed or contradictory.
        """
        stamp = _find_stamp(join_location(store, MANIFEST_NAME))
        return _read(store) if stamp is None else _open(store, stamp)

    def render(self) -> str:
        """The text of the file, which begins with the hash of the rest."""
        rest = self.model_dump_json(indent=1).removeprefix("{") + "\n"
        return f'{{\n "{SEAL_KEY}": "{hash_rest(rest.encode())}",{rest}'


@lru_cache(maxsize=4)
def _open(store: Path | str, stamp: tuple[int, int]) -> Manifest:
    return _read(store)


def _find_stamp(path: str) -> tuple[int, int] | None:
    """By what a changed file is known, its time and size; None where its time is not known, or could be the next one's too."""
    try:
        filesystem, inner = open_filesystem(path)
        info = filesystem.get_file_info(inner)
    except (OSError, ImportError, pa.ArrowException, ValueError, CorpusError):  # whoever reads the file says so
        return None
    is_settled = info.mtime_ns is not None and time.time_ns() - info.mtime_ns > SETTLED_S * 10**9
    return (info.mtime_ns, info.size) if is_settled else None


def _read(store: Path | str) -> Manifest:
    path = join_location(store, MANIFEST_NAME)
    try:
        with open_file(path) as handle:
            content = bytes(handle.read())
        sealed = _SEAL.match(content)
        if sealed is not None:
            content = content[sealed.end() :]
            if hash_rest(content) != sealed[1].decode():
                raise explain_file(store, MANIFEST_NAME, "was changed after it was written")
            content = b"{" + content
        manifest = Manifest.model_validate_json(content)
    except FileNotFoundError:
        raise CorpusError(
            f"corpus.store={hide_keys(store)}: no {MANIFEST_NAME}; not a token store, or its build did not finish"
        ) from None
    except ValidationError as error:
        raise CorpusError(f"{hide_keys(path)}: not a readable manifest ({describe_fault(error)})") from None
    except (OSError, ImportError, pa.ArrowException, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{hide_keys(path)}: not a readable manifest ({' '.join(str(error).split())[:200]})"
        ) from None
    contradiction = find_contradiction(manifest)
    if contradiction is not None:
        raise explain_file(store, MANIFEST_NAME, f"contradicts itself: {contradiction}")
    return manifest


def hash_rest(content: bytes) -> str:
    """The hash that stands before the rest of a manifest."""
    return xxhash.xxh3_128_hexdigest(content)


def resolve_store(path: str) -> Path | str:
    """A store's place: an absolute local path, or the address as it is."""
    return path if is_address(path) else Path(path).expanduser().resolve()
