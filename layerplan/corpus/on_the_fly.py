"""Rows made while training, for those without disk for a token store.

The input is cut into *chunks*, permuted anew for every epoch by the seed; position p of the endless row of chunks belongs
to lane p mod num_lanes, and a lane takes its chunks one after another, row by row. A checkpoint keeps the next row of
every lane, so that each chunk is read exactly once per epoch over any crash and any number of workers. How many rows a
chunk gives is not known before it was read: lanes drift apart, and which rows meet in a batch depends on the number of
lanes. There is no de-duplication across the corpus, and the last row of every chunk is padded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerplan.artifacts import compute_sha256, write_text
from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.build import (
    find_complete,
    hash_config,
    hash_units,
    warn_of_held_out,
    write_manifest,
)
from layerplan.corpus.chunks import FORMER_POLICY
from layerplan.corpus.decontamination import BenchmarkText, hash_held_out
from layerplan.corpus.joining import read_joining
from layerplan.corpus.manifest import Manifest, SourceRows
from layerplan.corpus.sources import UNIT_BYTES, list_units
from layerplan.corpus.unit import Unit
from layerplan.corpus.writer import explain_disk_faults
from layerplan.errors import CorpusError
from layerplan.run_folder import MANIFEST_NAME, STREAM_NAME

logger = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 64 * 2**10
CHUNKS_WANTED = 4096
MAX_WHOLE_BYTES = 64 * 2**20
"""Largest file that can be a chunk as a whole."""


def write_stream(
    config: CorpusConfig,
    tokenizer: Path,
    store: Path,
    *,
    questions: Sequence[BenchmarkText] = (),
    seed: int = 0,
    report: Callable[[str], None] = logger.info,
) -> Manifest:
    """Writes what training needs to make rows by itself: the chunks, the tokenizer, the filters. Reads no text.

    Raises:
        CorpusError: When a source is missing, a file is too large to be read as a whole, or the folder is taken.
        ModelError: When the tokenizer cannot be read, or nothing says which token ends a text.
    """
    joining = read_joining(config, tokenizer)
    chunks = list_chunks(config, report)
    config_sha256 = compute_sha256([hash_config(config, questions, seed), *map(hash_units, chunks)])
    content = {
        "config": config.model_dump(mode="json"),
        "tokenizer": joining.facts.json_text,
        "end_of_text_id": joining.end_of_text_id,
        "begin_ids": joining.begin_ids,
        "num_ids": joining.num_ids,
        "questions": [asdict(question) for question in questions],
        "chunks": [[unit.list_fields() for unit in chunk] for chunk in chunks],
        "seed": seed,
    }
    held_out_sha256 = hash_held_out(questions, config.decontamination)
    if (store / MANIFEST_NAME).exists():
        manifest = find_complete(store, joining, config_sha256, report)
        warn_of_held_out(manifest, store, held_out_sha256, report)
        # fields that do not change the rows may have changed; what decides them stays
        known = json.loads((store / STREAM_NAME).read_text(encoding="utf-8"))
        policy = {"control_tokens": known["config"].get("control_tokens", FORMER_POLICY)}
        kept = {"questions": known["questions"], "config": config.model_dump(mode="json") | policy}
        _write_content(store, content | kept)
        return manifest
    manifest = Manifest(
        mode="on_the_fly",
        seq_len=config.seq_len,
        rows_per_group=config.rows_per_group,
        num_rows=0,
        num_validation_rows=0,
        num_tokens=0,
        num_padding_tokens=0,
        **joining.describe(),
        config_sha256=config_sha256,
        held_out_sha256=held_out_sha256,
        counts={},
        num_questions=len(questions) if config.decontamination.enabled else 0,
        sources=[_no_rows(source.path) for source in config.sources],
        shards=[],
    )
    _write_content(store, content)
    write_manifest(store, manifest)
    for note in joining.facts.notes:
        report(note)
    report(f"{store}: {len(chunks):,} chunks of text to tokenize while training")
    return manifest


def _write_content(store: Path, content: dict[str, Any]) -> None:
    with explain_disk_faults(store):
        write_text(store / STREAM_NAME, json.dumps(content, ensure_ascii=False))


def _no_rows(path: str) -> SourceRows:
    names = ("num_rows", "num_tokens", "num_padding_tokens", "num_validation_rows", "num_validation_tokens")
    return SourceRows(path=path, weight=None, counts={}, **dict.fromkeys(names, 0))


def list_chunks(config: CorpusConfig, report: Callable[[str], None] | None = None) -> list[list[Unit]]:
    """Consecutive units of the input, joined to chunks: some 4,096 of them, between 64 KiB and 8 MiB each."""
    total = list_units(config).num_bytes
    size = min(UNIT_BYTES, max(MIN_CHUNK_BYTES, total // CHUNKS_WANTED))
    chunks: list[list[Unit]] = []
    room = 0
    for unit in list_units(config, unit_bytes=size, report=report):
        if unit.num_bytes > MAX_WHOLE_BYTES:
            raise CorpusError(
                f"corpus.mode=on_the_fly: {unit.path} has {unit.num_bytes:,} bytes and can only be read as a whole, which is"
                f" done up to {MAX_WHOLE_BYTES:,}; use plain JSONL or Parquet, smaller files, or mode=store"
            )
        if not chunks or unit.num_bytes > room:
            chunks.append([])
            room = size
        chunks[-1].append(unit)
        room -= unit.num_bytes
    return chunks
