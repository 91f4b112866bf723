"""What the ordered end of a build costs the one thread that packs, by the number of threads that write shards.

    python benchmarks/corpus_writers.py [--tokens 20000000] [--writers 1 2 4] [--out RESULTS.md]

Records of made-up documents (500 to 3,500 tokens of a Zipf distribution) go through `StoreWriter` in this process. Measured
is CPU time, of the packing thread alone (`time.thread_time`) and of all threads. Asserted: the same sha256 of every shard,
whatever the number of threads. What follows for more cores than this machine has is computed from these rates and from
those of the tokenizing actors and of Ray in `results/corpus.md`, not measured: the slowest of the three sets the pace.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import render_machine

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.journal import BuildJournal
from layerplan.corpus.tokenize import Record, _make_table
from layerplan.corpus.writer import StoreWriter

TOKENIZED_PER_CORE_S = 1.87e6
"""Tokens per CPU second of a tokenizing actor: 108 million in 58.0 s (`results/corpus.md`, auto)."""
DRIVER_PER_TOKEN_NS = 101.0
"""CPU of the whole driver there, Ray's share included: 11.0 s for 108 million tokens, written by the packing thread itself."""
CORES = (2, 4, 8, 16, 64)


class Rates(NamedTuple):
    """CPU nanoseconds per token."""

    packing: float
    """Of the thread that packs."""
    everything: float
    """Of all threads."""

    @property
    def writing(self) -> float:
        """Of the threads that write."""
        return self.everything - self.packing


def make_records(num_tokens: int) -> list[Record]:
    rng = np.random.default_rng(0)
    pool = np.minimum(rng.zipf(1.3, 2_000_000), 31_999).astype(np.int32)
    records: list[Record] = []
    while num_tokens > 0:
        size = int(rng.integers(500, 3_500))
        start = int(rng.integers(0, len(pool) - size))
        key = len(records).to_bytes(16, "little")
        records.append(Record(0, len(records), 0, str(len(records)), key=key, ids=pool[start : start + size].tobytes()))
        num_tokens -= size
    return records


def measure(records: list[Record], num_writers: int, folder: Path) -> tuple[Rates, list[str]]:
    """The rates, and the sha256 of every shard."""
    tables = [_make_table(records[start : start + 256]) for start in range(0, len(records), 256)]
    config = CorpusConfig(
        sources=[SourceConfig(path="x")], validation_rows=0, groups_per_shard=16, num_writers=num_writers
    )
    journal = BuildJournal(folder, "benchmark")
    writer = StoreWriter(config, folder, journal, end_of_text_id=0, num_ids=32_000, seed=0)
    thread_s, process_s = time.thread_time(), time.process_time()
    for table in tables:
        for fields in table.to_pylist():
            writer.add(Record(**fields))
    writer.finish_source(0, next_unit=1)
    thread_s, process_s = time.thread_time() - thread_s, time.process_time() - process_s
    writer.close()
    journal.close()
    tokens = sum(len(record.ids) for record in records) / 4
    return Rates(thread_s / tokens * 1e9, process_s / tokens * 1e9), [shard.sha256 for shard in writer.shards]


def compute_pace(cores: int, rates: Rates, num_writers: int) -> float:
    """Tokens per second of a build on so many cores: by all its work, by the packing thread, or by the writing threads.

    Args:
        cores: Of the machine or cluster.
        rates: As measured.
        num_writers: Threads that write; 0 for a packing thread that writes, too.
    """
    ray_ns = max(DRIVER_PER_TOKEN_NS - rates.everything, 0.0)
    all_ns = 1e9 / TOKENIZED_PER_CORE_S + rates.everything + ray_ns
    packing_ns = ray_ns + (rates.packing if num_writers else rates.everything)
    bounds = [cores * 1e9 / all_ns, 1e9 / packing_ns]
    return min([*bounds, num_writers * 1e9 / rates.writing] if num_writers else bounds)


def render(found: dict[int, Rates]) -> str:
    rows = "\n".join(
        f"| {count} | {rates.packing:.0f} | {rates.writing:.0f} | {1e3 / rates.packing:.1f} |"
        for count, rates in found.items()
    )
    most = max(found)
    paces = "\n".join(
        f"| {cores} | {compute_pace(cores, found[most], 0) / 1e6:.1f} |"
        f" {compute_pace(cores, found[most], most) / 1e6:.1f} |"
        for cores in CORES
    )
    return (
        f"# The ordered end of a build: threads that write shards\n\n{render_machine('pyarrow', 'numpy')}\n\n"
        "Same sha256 of every shard in every row.\n\n"
        "| writing threads | packing thread, CPU ns per token | writing threads, CPU ns per token |"
        f" packing thread alone, million tokens/s |\n|---|---|---|---|\n{rows}\n\n"
        "Computed from these rates and from those of [corpus.md](corpus.md), not measured: million tokens/s of a build with"
        f" {most} writing threads, Ray's share of the driver as measured there.\n\n"
        f"| cores | the packing thread writes, too | threads write |\n|---|---|---|\n{paces}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="Markdown file for the result")
    args = parser.parse_args()
    records, found, hashes = make_records(args.tokens), {}, []
    for count in args.writers:
        with tempfile.TemporaryDirectory(prefix="lpw") as folder:
            found[count], shards = measure(records, count, Path(folder))
        hashes.append(shards)
    assert all(shards == hashes[0] for shards in hashes), "the bytes depend on the number of threads"
    text = render(found)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
