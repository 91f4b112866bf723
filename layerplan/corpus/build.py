"""Raw text to a token store: read, clean, de-duplicate, decontaminate, tokenize, pack, write.

Reading, cleaning and tokenizing run in a Ray Data actor pool over the units; what must see every document in order
(de-duplication across the corpus, packing, writing) runs here, on the ordered stream the pool returns. The same
input, config and tokenizer give the same bytes, whatever the number of actors.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.manifest import MANIFEST_NAME, VALIDATION_NAME, Manifest, Shard
from layerplan.corpus.pack import Packer, RawRow
from layerplan.corpus.sources import list_units
from layerplan.corpus.store import write_rows
from layerplan.corpus.tokenize import FILTERED, KEPT, QUARANTINED, UnitTokenizer
from layerplan.errors import CorpusError
from layerplan.plan.hashing import compute_sha256

DUPLICATE = "duplicate"
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
MAX_QUARANTINE_LISTED = 1000
REPORT_EVERY_S = 5.0


def build_token_store(
    config: CorpusConfig,
    tokenizer: Path,
    store: Path,
    *,
    questions: Sequence[BenchmarkText] = (),
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Builds the store, or returns its manifest when it is already complete for this config and tokenizer.

    Args:
        config: Sources, filters and row layout.
        tokenizer: `tokenizer.json`, or the folder that holds it.
        store: Folder to write.
        questions: Benchmark questions to keep out.
        seed: Seed of the choice of validation rows.
        report: Receives progress lines.

    Raises:
        CorpusError: When a source is missing, nothing is kept, too much is malformed, or the store cannot be written.
    """
    tokenizer_file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    tokenizer_json = tokenizer_file.read_text(encoding="utf-8")
    tokenizer_sha256 = hash_tokenizer(tokenizer_file)
    config_sha256 = compute_sha256([_content_fields(config), [question.id for question in questions], seed])
    if (store / MANIFEST_NAME).exists():
        manifest = Manifest.load(store)
        if (manifest.tokenizer_sha256, manifest.config_sha256) == (tokenizer_sha256, config_sha256):
            report(f"found {store}: {manifest.num_rows:,} rows of {manifest.seq_len:,} tokens")
            return manifest
        raise CorpusError(
            f"{store}: was built from another corpus config or tokenizer; remove it or choose another name"
        )
    loaded = Tokenizer.from_str(tokenizer_json)
    writer = _StoreWriter(config, store, _find_end_of_text(loaded, tokenizer_file), seed)
    _consume(_iter_records(config, tokenizer_json, list(questions)), config, writer, report)
    return writer.finish(
        vocab_size=loaded.get_vocab_size(), tokenizer_sha256=tokenizer_sha256, config_sha256=config_sha256
    )


def hash_tokenizer(path: Path) -> str:
    """Hash of a `tokenizer.json`, as a store's manifest keeps it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _content_fields(config: CorpusConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"store", "num_workers", "num_cpus_per_worker"})


def _find_end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    for name in END_OF_TEXT_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise CorpusError(f"{path}: has no end-of-text token; one of {', '.join(END_OF_TEXT_NAMES)} is expected")


def _iter_records(
    config: CorpusConfig, tokenizer_json: str, questions: list[BenchmarkText]
) -> Iterator[dict[str, Any]]:
    """Records of all units in order, from a Ray Data actor pool."""
    import ray

    units = list_units(config)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 4 * 2**20
    context.execution_options.preserve_order = True
    rows = [{"source": unit.source, "path": unit.path, "format": unit.format} for unit in units]
    records = ray.data.from_items(rows, override_num_blocks=min(len(rows), 200)).map_batches(
        UnitTokenizer,
        fn_constructor_args=(config, tokenizer_json, questions),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.num_workers),
        num_cpus=config.num_cpus_per_worker,
    )
    for batch in records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield from batch.to_pylist()


def _consume(
    records: Iterator[dict[str, Any]], config: CorpusConfig, writer: _StoreWriter, report: Callable[[str], None]
) -> None:
    seen: set[bytes] = set()
    taken = Counter[int]()
    started = reported = time.monotonic()
    for record in records:
        source = record["source"]
        limit = config.sources[source].max_documents
        if limit is not None and taken[source] >= limit:
            continue
        if record["status"] != QUARANTINED:
            taken[source] += 1
        if record["status"] == KEPT and config.deduplicate:
            if record["key"] in seen:
                record["status"] = DUPLICATE
            seen.add(record["key"])
        writer.add(record)
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            report(writer.describe(reported - started))
    report(writer.describe(time.monotonic() - started))


class _StoreWriter:
    """Counts every record, packs the kept ones, and writes full shards as they come."""

    def __init__(self, config: CorpusConfig, store: Path, end_of_text_id: int, seed: int) -> None:
        self._config = config
        self._store = store
        self._end_of_text_id = end_of_text_id
        self._packer = Packer(config.seq_len, end_of_text_id)
        self._held_out = np.random.default_rng([seed, 1])
        self._counts = Counter[str]()
        self._sources = Counter[str]()
        self._quarantine: list[dict[str, Any]] = []
        self._rows: list[RawRow] = []
        self._validation: list[RawRow] = []
        self._shards: list[Shard] = []
        self._num_rows = self._num_tokens = 0
        shutil.rmtree(store, ignore_errors=True)
        try:
            store.mkdir(parents=True)
        except OSError as error:
            raise CorpusError(f"{store}: cannot be written ({error})") from None

    def add(self, record: dict[str, Any]) -> None:
        """Counts a record and packs it when it is kept."""
        status = record["status"]
        self._counts["in"] += 1
        self._counts[f"{status}/{record['reason']}" if status == FILTERED else status] += 1
        if status == QUARANTINED and len(self._quarantine) < MAX_QUARANTINE_LISTED:
            self._quarantine.append({"where": record["id"], "reason": record["reason"]})
        if status == KEPT:
            self._sources[self._config.sources[record["source"]].path] += 1
            for row in self._packer.add(np.frombuffer(record["ids"], dtype=np.int32)):
                self._add_row(row)

    def describe(self, elapsed_s: float) -> str:
        """One progress line."""
        tokens_per_s = self._num_tokens / max(elapsed_s, 1e-9)
        return (
            f"{self._counts['in']:,} documents in, {self._counts[KEPT]:,} kept,"
            f" {self._num_tokens:,} tokens, {tokens_per_s:,.0f} tokens/s"
        )

    def finish(self, *, vocab_size: int, tokenizer_sha256: str, config_sha256: str) -> Manifest:
        """Writes what is left and the manifest, last."""
        self._check_counts()
        last = self._packer.finish()
        padding = 0
        if last is not None and len(self._rows) + len(self._shards) > 0:
            padding = self._config.seq_len - last.used
            self._rows.append(last)
            self._num_rows += 1
            self._num_tokens += last.used
        if self._num_rows == 0:
            raise CorpusError(
                f"corpus.sources: {self._counts['in']} documents in, none fills a row of seq_len={self._config.seq_len};"
                " at least one full row of text is needed"
            )
        self._flush(everything=True)
        if self._validation:
            write_rows(
                self._store / VALIDATION_NAME,
                self._validation,
                first_row_id=-len(self._validation),
                rows_per_group=self._config.rows_per_group,
            )
        manifest = Manifest(
            seq_len=self._config.seq_len,
            rows_per_group=self._config.rows_per_group,
            num_rows=self._num_rows,
            num_validation_rows=len(self._validation),
            num_tokens=self._num_tokens,
            num_padding_tokens=padding,
            vocab_size=vocab_size,
            end_of_text_id=self._end_of_text_id,
            tokenizer_sha256=tokenizer_sha256,
            config_sha256=config_sha256,
            counts=dict(sorted(self._counts.items())),
            sources=dict(self._sources),
            quarantine=self._quarantine,
            shards=self._shards,
        )
        partial = self._store / (MANIFEST_NAME + ".partial")
        partial.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(self._store / MANIFEST_NAME)
        return manifest

    def _add_row(self, row: RawRow) -> None:
        if len(self._validation) < self._config.validation_rows and self._held_out.random() < 0.05:
            self._validation.append(row)
            return
        self._rows.append(row)
        self._num_rows += 1
        self._num_tokens += row.used
        self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        size = self._config.rows_per_group * self._config.groups_per_shard
        while len(self._rows) >= size or (everything and self._rows):
            rows, self._rows = self._rows[:size], self._rows[size:]
            path = self._store / f"shard_{len(self._shards):06d}.parquet"
            first = sum(shard.num_rows for shard in self._shards)
            self._shards.append(write_rows(path, rows, first_row_id=first, rows_per_group=self._config.rows_per_group))

    def _check_counts(self) -> None:
        bad = self._counts[QUARANTINED] / max(self._counts["in"], 1)
        if bad > self._config.max_bad_fraction:
            first = self._quarantine[0]
            raise CorpusError(
                f"corpus.max_bad_fraction={self._config.max_bad_fraction}: {self._counts[QUARANTINED]} of"
                f" {self._counts['in']} inputs are malformed ({bad:.1%}); the first is {first['where']}: {first['reason']}"
            )
