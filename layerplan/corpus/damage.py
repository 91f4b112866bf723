"""What is said when a file of a token store is not what was written: which file, which rows, whose, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerplan.corpus.row_groups import HASH_CHARS, WrongRowsError, count_groups
from layerplan.errors import CorpusError
from layerplan.storage.address import hide_keys, join_location

if TYPE_CHECKING:
    from layerplan.corpus.manifest import Manifest, Shard

BUILD = "layerplan corpus build --config FILE"
VERIFY = "layerplan corpus verify"


def advise(store: Path | str) -> str:
    """What to do about damage that a reader came upon."""
    return f"{advise_rebuild(store)}; `{VERIFY} {hide_keys(store)}` lists all damage"


def advise_rebuild(store: Path | str) -> str:
    """How to mend a store."""
    return (
        f"put a good copy of the file back, or remove {hide_keys(store)} and build it again with `{BUILD}`, since no"
        " shard can be built alone"
    )


def explain_file(store: Path | str, name: str, why: str) -> CorpusError:
    """The error for a file that cannot be used as a whole."""
    return CorpusError(f"{hide_keys(join_location(store, name))}: {why}; {advise(store)}")


def explain_group(store: Path | str, manifest: Manifest, shard: Shard, group: int, error: BaseException) -> CorpusError:
    """The error for one row group."""
    if isinstance(error, FileNotFoundError):
        return explain_file(store, shard.name, f"cannot be read (is missing; {describe_rows(manifest, shard)})")
    return explain_file(store, shard.name, describe_group(manifest, shard, group, error))


def describe_group(manifest: Manifest, shard: Shard, group: int, error: BaseException) -> str:
    """What is wrong with one row group, in words."""
    place = f"row group {group} of {count_groups(shard.num_rows, manifest.rows_per_group)}"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, WrongRowsError):
        text += _find_owner(manifest, error.found)
    return f"{place} ({describe_rows(manifest, shard, group)}) cannot be read ({text})"


def describe_rows(manifest: Manifest, shard: Shard, group: int | None = None) -> str:
    """Row ids of a shard or a group of it, and the source they came from."""
    if shard not in manifest.shards:
        return "held-out rows"
    first = sum(entry.num_rows for entry in manifest.shards[: manifest.shards.index(shard)])
    start, stop = first, first + shard.num_rows
    if group is not None:
        start = first + group * manifest.rows_per_group
        stop = min(start + manifest.rows_per_group, stop)
    end = 0
    for source in manifest.sources:
        end += source.num_rows
        if start < end:
            return f"rows {start} to {stop - 1}, source {source.path}"
    return f"rows {start} to {stop - 1}"


def _find_owner(manifest: Manifest, found: str) -> str:
    for shard in manifest.files:
        place = shard.groups_xxh3_128.find(found)
        if place >= 0 and place % HASH_CHARS == 0:
            return f"; they are the rows of group {place // HASH_CHARS} of {shard.name}"
    return ""
