"""What the driver and rank 0 hold at full size, piece by piece: seconds and memory, each in a process of its own.

    python benchmarks/full_size.py [--only NAME ...] [--out RESULTS.md]

Simulated are the numbers of things (rows, shards, files, workers, checkpoints, trials), never the code: each piece calls what
a run calls. Where full size would take hours, a part of it runs and the rest is in proportion; the table says which.
Memory is the most a process had resident above what it had before the piece began.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loading import make_environment, read_peak, set_peak_back
from machine import render_machine

MIB = 2**20
ROWS, SHARDS, WORKERS, CHECKPOINTS, TRIALS = 64_000_000, 10_000, 512, 1_000, 200
SOURCES = 50
HEX = "0" * 64

Work = Callable[[], object]


@dataclass(frozen=True)
class Piece:
    """Something that is asked once or once a step."""

    what: str
    prepare: Callable[[Path], Work]
    """Makes what a run would find; returns what is measured."""
    share: float = 1.0
    """Of full size that was run."""


def load_manifest(folder: Path) -> Work:
    write_manifest(folder)
    from layerplan.corpus.manifest import Manifest

    return lambda: Manifest.load(folder)


def ask_schedule(folder: Path) -> Work:
    write_manifest(folder)
    from layerplan.corpus.stream import make_schedule

    schedule = make_schedule(folder, num_lanes=WORKERS * 8, seed=0)
    return lambda: [schedule.rows_at(step) for step in (0, 1, 7_000, 15_000)]


def write_manifest(folder: Path) -> None:
    """A store's manifest of so many shards, in 50 sources."""
    from layerplan.artifacts import write_text
    from layerplan.corpus.manifest import Manifest, Shard, SourceRows
    from layerplan.run_folder import MANIFEST_NAME

    per_shard, counts = ROWS // SHARDS, {"in": 1, "kept": 1}
    shards = [
        Shard(name=f"shard_{i:06d}.parquet", num_rows=per_shard, num_tokens=per_shard, sha256=HEX)
        for i in range(SHARDS)
    ]
    source = {
        "weight": None,
        "num_padding_tokens": 0,
        "num_validation_rows": 0,
        "num_validation_tokens": 0,
        "counts": counts,
    }
    sources = [
        SourceRows(path=f"s{i}", num_rows=ROWS // SOURCES, num_tokens=ROWS // SOURCES, **source) for i in range(SOURCES)
    ]
    sizes = {
        "seq_len": 1,
        "rows_per_group": 16,
        "num_rows": ROWS,
        "num_tokens": ROWS,
        "vocab_size": 1,
        "end_of_text_id": 0,
    }
    none = {
        "num_validation_rows": 0,
        "num_padding_tokens": 0,
        "tokenizer_sha256": HEX,
        "config_sha256": HEX,
        "counts": counts,
    }
    write_text(folder / MANIFEST_NAME, Manifest(sources=sources, shards=shards, **sizes, **none).model_dump_json())


def list_small_files(folder: Path) -> Work:
    """A thousand folders of a thousand files: listed, hashed and joined to items for the tokenizing processes.

    A tenth of them is handed out before, so that what is imported and what is held of some at a time is not counted.
    """
    text = folder / "text"
    for number in range(1000):
        inner = text / str(number // 100) / f"{number:03d}"
        inner.mkdir(parents=True)
        for name in range(1000):
            (inner / f"document_{name:06d}.txt").touch()
    from layerplan.config.corpus import CorpusConfig
    from layerplan.corpus.build import hash_units, join_units
    from layerplan.corpus.sources import list_units

    def hand_out(path: Path) -> None:
        units = list_units(CorpusConfig.model_validate({"sources": [{"path": str(path)}]}))
        hash_units(units)
        units.sum_bytes()
        for _ in join_units(units, num_workers=64):
            pass

    hand_out(text / "0")
    return lambda: hand_out(text)


def remember_documents(folder: Path) -> Work:
    """Keys of a million documents, committed with every ten thousand, a tenth of them seen before."""
    from layerplan.corpus.journal import BuildJournal

    journal = BuildJournal(folder, "identity")

    def add() -> None:
        for number in range(1_000_000):
            journal.add_key(((number * 9 // 10) * 0x9E3779B97F4A7C15 % 2**128).to_bytes(16, "little"))
            if number % 10_000 == 9_999:
                journal.commit({"number": number}, {})

    return add


def resume_ledger(folder: Path) -> Work:
    """A hundred thousand steps of 1,024 rows, the last hundred of which are taken again."""
    import numpy as np

    from layerplan.train.ledger import LedgerWriter, hash_row_ids

    path, draw = folder / "ledger.jsonl", np.random.default_rng(0)
    rows = np.sort(draw.integers(0, ROWS, 1024))
    line = json.dumps({"num_rows": 1024, "sha256": hash_row_ids(rows), "row_ids": rows.tolist()})[1:]
    with path.open("w") as handle:
        for step in range(1, 100_001):
            handle.write(f'{{"step": {step}, {line}\n')
    return lambda: LedgerWriter(path, start_step=99_900, rank=0, world_size=1)


def resume_metrics(folder: Path) -> Work:
    """A line every ten of a million steps."""
    from layerplan.tracking.jsonl import JsonlSink

    path, values = folder / "metrics.jsonl", {f"train/value_{number}": number / 7 for number in range(12)}
    with path.open("w") as handle:
        for step in range(10, 1_000_001, 10):
            handle.write(json.dumps({"run": "train", "step": step, "time": 1.0, **values}) + "\n")
    return lambda: JsonlSink(path, "train", 990_000)


def gather_ledger_line(folder: Path) -> Work:
    """One step of what all workers trained on, as rank 0 writes it."""
    import numpy as np

    from layerplan.train.ledger import LedgerWriter

    writer = LedgerWriter(folder / "ledger.jsonl", start_step=0, rank=0, world_size=1)
    rows = np.random.default_rng(0).integers(0, ROWS, WORKERS * 8)
    return lambda: writer.write(1, rows)


def choose_among_checkpoints(folder: Path) -> Work:
    """Checkpoints of 512 workers with a file each."""
    from layerplan.artifacts import write_text
    from layerplan.checkpoint.index import inspect_checkpoints
    from layerplan.checkpoint.seal import FileMark, Seal, write_seal
    from layerplan.run_folder import STATE_NAME, name_step

    mark = FileMark(size=1, xxh3_128="0" * 32)
    files = {f"__{rank}_0.distcp": mark for rank in range(WORKERS)} | {STATE_NAME: mark, ".metadata": mark}
    for number in range(1, CHECKPOINTS + 1):
        checkpoint = folder / name_step(number * 100)
        checkpoint.mkdir()
        write_text(checkpoint / STATE_NAME, json.dumps({"step": number * 100, "plan_sha256": HEX}))
        identity = {"step": number * 100, "tokens_seen": 0, "plan_sha256": HEX, "corpus_sha256": HEX, "run_id": "run"}
        write_seal(checkpoint, Seal(files=files, **identity))
    return lambda: inspect_checkpoints(folder, lambda state: None, "run")


def read_trials(folder: Path) -> Work:
    """A sweep's ended trials with a hundred reports each, read as a resubmission does."""
    from layerplan.train.trial_record import TrialRecord, add_report, load_records, read_reports

    for number in range(TRIALS):
        trial = folder / f"boundary_{number:03d}"
        trial.mkdir()
        sizes = {"boundary": number, "step": 100, "max_steps": 100, "loss": 1.0, "flops_share": 0.5}
        TrialRecord(name=trial.name, **sizes).save(trial)
        for step in range(100):
            add_report(trial, {"step": step, "loss": 1.0})
    return lambda: ([read_reports(path) for path in folder.glob("boundary_*")], load_records(folder))


PIECES = {
    "manifest": Piece("a store of 64 M rows in 10,000 shards is opened", load_manifest),
    "schedule": Piece("rows of four steps of 4,096 are found among 64 M", ask_schedule),
    "small files": Piece("100 M files of text are listed and handed out", list_small_files, share=1e-2),
    "documents": Piece("100 M documents are told from those seen before", remember_documents, share=1e-2),
    "ledger": Piece("a run of 100,000 steps of 1,024 rows goes on", resume_ledger),
    "ledger line": Piece("a step of 512 workers, 4,096 rows, is written down", gather_ledger_line),
    "metrics": Piece("a run of 1 M steps goes on", resume_metrics),
    "checkpoints": Piece("1,000 checkpoints of 512 workers are looked at", choose_among_checkpoints),
    "trials": Piece("200 trials of a sweep, 100 reports each, are read", read_trials),
}


def measure(name: str) -> dict[str, float]:
    """Runs one piece in this process."""
    with tempfile.TemporaryDirectory() as folder:
        work = PIECES[name].prepare(Path(folder))
        set_peak_back()
        before, started = read_peak(), time.perf_counter()
        kept = work()
        seconds = time.perf_counter() - started
        del kept
        return {"seconds": seconds, "bytes": read_peak() - before}


def render(found: dict[str, dict[str, float]]) -> str:
    """The table."""
    rows = "".join(
        f"| {PIECES[name].what} | {PIECES[name].share:.4g} | {each['seconds']:.3g} | {each['bytes'] / MIB:,.0f} |"
        f" {each['seconds'] / PIECES[name].share:,.3g} | {each['bytes'] / PIECES[name].share / MIB:,.0f} |\n"
        for name, each in found.items()
    )
    return (
        f"# The driver at full size\n\n{render_machine()}\n\n"
        "| | share run | seconds | MiB | seconds at full size | MiB at full size |\n|---|---|---|---|---|---|\n"
        + rows
        + "\nKeys of documents lie in SQLite, whose memory ends at its cache of 128 MiB, whatever the proportion says.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        print(json.dumps(measure(args.piece)))
        return
    found: dict[str, Any] = {}
    env = make_environment()
    for name in args.only:
        command = [sys.executable, __file__, "--piece", name]
        said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
        print(name, found[name], flush=True)
    text = render(found)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
