"""The corpus against its bounds: a build beside the bare tokenizer, its memory, the reader, and a resume at any position.

    python benchmarks/corpus.py --data $LAYERPLAN_DATA/zh --mib 2048

Text is the documents of `--data` again and again, each copy with a line of its own so that none is a duplicate. The peer is
`encode_batch_fast` alone: two processes, text in memory, half of a sample each, timed before and after our build. Ours
is the whole build on Ray in the same run: reading, cleaning, de-duplication, decontamination, tokenizing, packing,
writing. On a shared machine the wall clock says little, so the ratio is given in CPU seconds too, ours being those of
every process of the Ray cluster. Memory is the sum of proportional set sizes over the same processes, every 10 s.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.manifest import MANIFEST_NAME, Manifest
from layerplan.corpus.schedule import LaneSchedule, RowRange
from layerplan.corpus.store import StoreReader
from layerplan.corpus.stream import iter_rank_steps
from layerplan.models.scratch import train_tokenizer

MIB = 2**20
BATCH = 256
SIMULATED_ROWS = 64_000_000


@dataclass
class TreeMeter:
    """CPU seconds and peak memory of this process and all below it."""

    peak_pss: int = 0
    names: dict[int, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _cpu_s: dict[int, float] = field(default_factory=dict)
    _thread: threading.Thread | None = None

    def __enter__(self) -> TreeMeter:
        self._sample()
        self._before = dict(self._cpu_s)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._sample()

    @property
    def cpu_s(self) -> float:
        """CPU seconds since the start, of processes that ended in between up to their last sample."""
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu_s.items())

    def describe(self) -> dict[str, float]:
        """CPU seconds by the beginning of the command line, those that took a second or more."""
        parts: dict[str, float] = {}
        for pid, seconds in self._cpu_s.items():
            name = self.names.get(pid, "")
            parts[name] = round(parts.get(name, 0.0) + seconds - self._before.get(pid, 0.0), 1)
        return {name: seconds for name, seconds in sorted(parts.items()) if seconds >= 1}

    def _run(self) -> None:
        while not self._stop.wait(10):
            self._sample()

    def _sample(self) -> None:
        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
                self.names[process.pid] = " ".join(process.cmdline())[:40]
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak_pss = max(self.peak_pss, total)


def load_texts(folder: Path) -> list[str]:
    """Every document of the data folder."""
    return [text for path in sorted(folder.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]


def write_corpus(texts: list[str], folder: Path, num_bytes: int) -> int:
    """Writes about `num_bytes` of JSONL in files of 256 MiB; returns the characters of text."""
    folder.mkdir(parents=True)
    written = num_chars = copy = 0
    handle = None
    while written < num_bytes:
        for number, text in enumerate(texts):
            if handle is None or handle.tell() > 256 * MIB:
                handle = (folder / f"{written:014d}.jsonl").open("wb")
            marked = f"{text}\n{copy} {number}"
            written += handle.write(
                json.dumps({"id": f"{copy}-{number}", "text": marked}, ensure_ascii=False).encode() + b"\n"
            )
            num_chars += len(marked)
            if written >= num_bytes:
                break
        copy += 1
    return num_chars


def encode_half(tokenizer_json: str, texts: list[str], barrier: Any, results: Any) -> None:
    """The peer's process: encodes its texts and reports (tokens, wall seconds, CPU seconds)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_batch_fast(texts[:8])
    barrier.wait()
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), BATCH):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)))
    results.put((tokens, time.perf_counter() - wall, time.process_time() - cpu))


def measure_bare(tokenizer_json: str, texts: list[str]) -> dict[str, float]:
    """Tokens per second of the bare tokenizer in two processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=encode_half, args=(tokenizer_json, texts[half::2], barrier, results))
        for half in range(2)
    ]
    for process in processes:
        process.start()
    parts = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens = sum(part[0] for part in parts)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / max(part[1] for part in parts),
        "tokens_per_cpu_s": tokens / sum(part[2] for part in parts),
    }


def measure_build(config: CorpusConfig, tokenizer: Path, store: Path, questions: list[BenchmarkText]) -> dict[str, Any]:
    """The whole build on Ray, and what it took."""
    with TreeMeter() as meter:
        started = time.perf_counter()
        manifest = build_token_store(config, tokenizer, store, questions=questions, report=say)
        wall_s = time.perf_counter() - started
    tokens = manifest.num_tokens + sum(source.num_validation_tokens for source in manifest.sources)
    return {
        "tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / meter.cpu_s,
        "cpu_s": meter.describe(),
        "peak_pss_gib": meter.peak_pss / 2**30,
        "counts": manifest.counts,
    }


def measure_reader(store: Path, num_steps: int) -> dict[str, float]:
    """Tokens per second of one rank's reader on Ray, 16 rows a step."""
    lanes = 16
    with TreeMeter() as meter:
        started = time.perf_counter()
        first_s = tokens = 0.0
        for rows in iter_rank_steps(
            store, num_lanes=lanes, seed=0, rank=0, world_size=1, start_step=7, stop_step=7 + num_steps
        ):
            first_s = first_s or time.perf_counter() - started
            tokens += rows.input_ids.size
        wall_s = time.perf_counter() - started
    return {"first_step_s": first_s, "tokens_per_s": tokens / wall_s, "tokens_per_cpu_s": tokens / meter.cpu_s}


def measure_resume(store: Path, folder: Path) -> dict[str, float]:
    """A manifest of 64 million rows of 4,096 tokens whose shards all are links to one; resumes at random positions."""
    import psutil

    small = Manifest.load(store)
    shard = max(small.shards, key=lambda item: item.num_rows)
    count = -(-SIMULATED_ROWS // shard.num_rows)
    shards = [shard.model_copy(update={"name": f"{number:06d}/{shard.name}"}) for number in range(count)]
    for item in shards:
        (folder / item.name).parent.mkdir(parents=True)
        (folder / item.name).symlink_to(store / shard.name)
    rows = count * shard.num_rows
    source = small.sources[0].model_copy(update={"num_rows": rows, "num_tokens": rows * small.seq_len})
    big = small.model_copy(
        update={"num_rows": rows, "num_tokens": rows * small.seq_len, "sources": [source], "shards": shards}
    )
    (folder / MANIFEST_NAME).write_text(big.model_dump_json())
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    reader = StoreReader(folder)
    schedule = LaneSchedule((RowRange(rows),), big.rows_per_group, 512, seed=0)
    schedule.rows_at(0)
    load_s = time.perf_counter() - started
    memory = psutil.Process().memory_info().rss - before
    seconds = []
    for step in np.random.default_rng(0).integers(0, 3 * rows // 512, 8).tolist():
        started = time.perf_counter()
        for _ in reader.read_rows(schedule.rank_rows_at(step, 3, 64)).split(8):
            pass
        seconds.append(time.perf_counter() - started)
    return {"rows": rows, "load_s": load_s, "memory_mib": memory / MIB, "worst_first_step_s": max(seconds)}


def say(line: str) -> None:
    """Prints at once."""
    print(line, flush=True)


def describe_machine() -> dict[str, Any]:
    """What a result must say about where it comes from."""
    import pyarrow
    import ray
    import tokenizers

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "cpu": f"{cpu or platform.processor()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg(),
        "versions": {module.__name__: module.__version__ for module in (ray, tokenizers, pyarrow, np)},
    }


def sample_of(texts: list[str], num_chars: int) -> list[str]:
    """Whole documents of about so many characters, from the beginning."""
    taken: list[str] = []
    for text in texts:
        taken.append(text)
        num_chars -= len(text)
        if num_chars < 0:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Parquet files with a `text` column")
    parser.add_argument("--mib", type=int, default=64, help="size of the corpus")
    parser.add_argument("--sample-chars", type=int, default=12_000_000, help="text the bare tokenizer is timed on")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--reader-steps", type=int, default=256)
    parser.add_argument(
        "--consumption", type=float, default=2059, help="tokens/s a training consumes; the quick start's"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    import ray

    report: dict[str, Any] = {"machine": describe_machine()}
    say(json.dumps(report["machine"], indent=2))
    with tempfile.TemporaryDirectory(prefix="lpc") as name:
        folder = Path(name)
        texts = load_texts(args.data)
        train_tokenizer(
            sample_of(texts, 4_000_000), vocab_size=args.vocab_size, out_dir=folder / "tokenizer", max_length=4096
        )
        tokenizer = folder / "tokenizer" / "tokenizer.json"
        say(f"writing {args.mib} MiB")
        write_corpus(texts, folder / "raw", args.mib * MIB)
        sample = sample_of(texts * 20, args.sample_chars)
        questions = [
            BenchmarkText(str(number), text[5000:5060]) for number, text in enumerate(texts) if len(text) > 1e5
        ]
        config = CorpusConfig(
            sources=[SourceConfig(path=str(folder / "raw"))],
            seq_len=args.seq_len,
            num_workers=2,
            num_cpus_per_worker=0.5,
        )
        before = measure_bare(tokenizer.read_text(), sample)
        say(f"bare before  {before}")
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", _temp_dir=tempfile.mkdtemp(prefix="lpr"))
        ray.data.DataContext.get_current().enable_progress_bars = False
        built = measure_build(config, tokenizer, folder / "store", questions)
        say(f"build        {built}")
        after = measure_bare(tokenizer.read_text(), sample)
        say(f"bare after   {after}")
        reader = measure_reader(folder / "store", args.reader_steps)
        say(f"reader       {reader}")
        ray.shutdown()
        resume = measure_resume(folder / "store", folder / "simulated")
        say(f"resume       {resume}")
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        report[f"build_over_bare_{key}"] = 2 * built[key] / (before[key] + after[key])
    report["reader_over_consumption"] = reader["tokens_per_s"] / args.consumption
    report |= {"bare_before": before, "build": built, "bare_after": after, "reader": reader, "resume": resume}
    say(json.dumps({key: value for key, value in report.items() if isinstance(value, float)}, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
