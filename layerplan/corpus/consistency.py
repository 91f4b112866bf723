"""Whether a manifest agrees with itself: its numbers are said several times over, and an edited one contradicts the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from layerplan.corpus.row_groups import HASH_CHARS, count_groups

if TYPE_CHECKING:
    from layerplan.corpus.manifest import Manifest


def find_contradiction(manifest: Manifest) -> str | None:
    """The first contradiction in words, or None."""
    return next(_iter_contradictions(manifest), None)


def _iter_contradictions(manifest: Manifest) -> Iterator[str]:
    if manifest.mode != "store":
        return
    for name in ("num_rows", "num_tokens", "num_padding_tokens", "num_validation_rows"):
        total, parts = getattr(manifest, name), sum(getattr(source, name) for source in manifest.sources)
        if total != parts:
            yield f"{name}={total:,}, its sources have {parts:,}"
    for name in ("num_rows", "num_tokens"):
        total, parts = getattr(manifest, name), sum(getattr(shard, name) for shard in manifest.shards)
        if total != parts:
            yield f"{name}={total:,}, its shards have {parts:,}"
    yield from _iter_split_shards(manifest)
    if manifest.labels is not None and len(manifest.labels.start_layers) != manifest.num_rows:
        yield f"num_rows={manifest.num_rows:,}, start layers are given for {len(manifest.labels.start_layers):,}"
    names = [shard.name for shard in manifest.files]
    if len(set(names)) != len(names):
        yield f"{next(name for name in names if names.count(name) > 1)} is listed twice"
    if manifest.validation is not None and manifest.validation.num_rows != manifest.num_validation_rows:
        yield f"num_validation_rows={manifest.num_validation_rows:,}, the file has {manifest.validation.num_rows:,}"
    for shard in manifest.files:
        if shard.max_id is not None and shard.max_id >= manifest.vocab_size:
            yield f"{shard.name} holds token {shard.max_id}, ids are below {manifest.vocab_size}"
        num_groups = count_groups(shard.num_rows, manifest.rows_per_group)
        if len(shard.groups_xxh3_128) not in (0, num_groups * HASH_CHARS):
            yield f"{shard.name} has {len(shard.groups_xxh3_128) // HASH_CHARS} hashes for {num_groups} row groups"


def _iter_split_shards(manifest: Manifest) -> Iterator[str]:
    """Each source's rows fill shards of their own."""
    ends, end = {0}, 0
    for shard in manifest.shards:
        end += shard.num_rows
        ends.add(end)
    end = 0
    for source in manifest.sources:
        end += source.num_rows
        if end not in ends:
            yield f"source {source.path} ends at row {end:,}, in the middle of a shard"
