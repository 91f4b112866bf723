"""The corpus against its bounds: a build beside the bare tokenizer, its memory, the reader, and a resume at any position.

    python benchmarks/corpus.py --data $LAYERPLAN_DATA/zh --mib 768 --memory-mib 2048 --out RESULTS.md

Text is the documents of `--data` again and again; in every copy the Chinese characters move on under the punctuation, so
that no document and no Chinese clause comes back for a cache; other words do. The peer is `encode_batch_fast` of
`tokenizers` alone. Three comparisons with the whole build (reading, cleaning, de-duplication, decontamination, tokenizing,
packing, writing; decontamination against 250,000 n-grams of questions, about what C-Eval's validation part and CMMLU
have), each for `corpus.tokenizer_library=auto` and `=tokenizers`:

- *interleaved*: in one process, the bare tokenizer and the build take turns on the same stretches of text; medians of
  the turns' ratios of CPU time per token, which a busy machine distorts least;
- *on Ray, wall*: the peer in two processes, text in memory, and a build on Ray, in turns of 3 and 6 seconds: one stands
  still while the other runs, and the build is charged for what its driver does meanwhile;
- *on Ray, CPU*: the same in CPU seconds, ours being those of every process of the Ray cluster, its start included.

Memory is the sum of proportional set sizes over the cluster's processes, also while a larger corpus is built.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import fastokens
import numpy as np
import psutil
import pyarrow.parquet as pq
from bare_tokenizer import BATCH, BareTurns, make_bare
from machine import describe_machine
from process_tree import TreeMeter

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.codepoints import CJK_FIRST, CJK_LAST, encode_codes
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.journal import BuildJournal
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.readers import Document, read_unit
from layerplan.corpus.schedule import LaneSchedule, RowRange
from layerplan.corpus.schedule import _permute as permutations
from layerplan.corpus.sources import Unit, list_units
from layerplan.corpus.store import StoreReader
from layerplan.corpus.stream import iter_rank_steps
from layerplan.corpus.tokenize import UnitTokenizer
from layerplan.corpus.writer import StoreWriter
from layerplan.models.scratch import train_tokenizer
from layerplan.ray_access import LOOPBACK, ask_for_token, stay_on_loopback
from layerplan.run_folder import MANIFEST_NAME

MIB = 2**20
SIMULATED_ROWS = 64_000_000
LIBRARIES: tuple[Literal["auto", "tokenizers"], ...] = ("auto", "tokenizers")
INTERLEAVED_UNITS = 13
INTERLEAVED_BYTES = 2 * MIB


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
            marked = f"{move_characters(text, copy)}\n{copy} {number}"
            written += handle.write(
                json.dumps({"id": f"{copy}-{number}", "text": marked}, ensure_ascii=False).encode() + b"\n"
            )
            num_chars += len(marked)
            if written >= num_bytes:
                break
        copy += 1
    return num_chars


def move_characters(text: str, copy: int) -> str:
    """Moves the Chinese characters of a text on by 37 for every copy; all else stays where it is."""
    codes = encode_codes(text).copy()
    chinese = np.flatnonzero((codes >= CJK_FIRST) & (codes <= CJK_LAST))
    codes[chinese] = np.roll(codes[chinese], 37 * copy)
    return codes.tobytes().decode("utf-32-le")


def measure_interleaved(
    config: CorpusConfig, tokenizer_json: str, questions: list[BenchmarkText], folder: Path
) -> dict[str, dict[str, float]]:
    """CPU time of the bare tokenizer over that of others, stretch by stretch in turns; 1 means no overhead."""
    units = list(enumerate(list_units(config, unit_bytes=INTERLEAVED_BYTES)[:-1]))[:INTERLEAVED_UNITS]
    bare = {name: encoder(tokenizer_json) for name, encoder in (("bare", make_bare), ("fastokens", make_fastokens))}
    builds = {
        library: OneProcessBuild(config, library, tokenizer_json, questions, folder / library) for library in LIBRARIES
    }
    names = [*bare, *builds]
    ratios: dict[str, list[float]] = {name: [] for name in names[1:]}
    for number, unit in units:
        texts = [item.text for item in read_unit(unit, config.sources[0]) if isinstance(item, Document)]
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        per_token = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.process_time()
            tokens = sum(map(bare[name], batches)) if name in bare else builds[name].add(number, unit)
            per_token[name] = (time.process_time() - started) / tokens
        for name, values in ratios.items():
            values.append(per_token["bare"] / per_token[name])
    for build in builds.values():
        build.close()
    return {name: describe_ratios(values[1:]) for name, values in ratios.items()}


class OneProcessBuild:
    """A build without Ray, unit by unit."""

    def __init__(
        self, config: CorpusConfig, library: str, tokenizer_json: str, questions: list[BenchmarkText], folder: Path
    ) -> None:
        folder.mkdir(parents=True)
        # small shards, so that they are written in every turn
        config = config.model_copy(update={"groups_per_shard": 1, "tokenizer_library": library})
        self._mapper = UnitTokenizer(config, tokenizer_json, questions)
        self._journal = BuildJournal(folder, "interleaved")
        self._writer = StoreWriter(config, folder, self._journal, end_of_text_id=0, seed=0)

    def add(self, number: int, unit: Unit) -> int:
        """Adds a unit and counts its tokens; what is dropped is not tokenized, and does not count."""
        tokens = 0
        for record in (record for records in self._mapper.read(number, unit) for record in records):
            tokens += len(record.ids) // 4
            self._writer.add(record)
        return tokens

    def close(self) -> None:
        self._writer.close()
        assert self._writer.state.shards, "no shard was written while the clock ran"
        self._journal.close()


def make_fastokens(tokenizer_json: str) -> Callable[[list[str]], int]:
    """Counts the tokens of a batch by `fastokens`."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
    return lambda batch: len(tokenizer.encode_batch_flat(batch)[0]) // 4


def describe_ratios(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "lower_quartile": low, "upper_quartile": high, "turns": len(ratios)}


def measure_build(
    config: CorpusConfig, tokenizer: Path, store: Path, questions: list[BenchmarkText], turns: BareTurns | None = None
) -> dict[str, Any]:
    """The whole build on Ray, and what it took beside the turns of the peer."""
    with TreeMeter(turns.pids if turns else frozenset()) as meter:
        started = time.perf_counter()
        manifest = build_token_store(config, tokenizer, store, questions=questions, report=say)
        wall_s = time.perf_counter() - started - (turns.paused_s - turns.driver_cpu_s if turns else 0.0)
    tokens = manifest.num_tokens + sum(source.num_validation_tokens for source in manifest.sources)
    return {
        "tokens": tokens,
        "wall_s": wall_s,
        "charged_for_turns_s": turns.driver_cpu_s if turns else 0.0,
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
    small = Manifest.load(store)
    shard = max(small.shards, key=lambda item: item.num_rows)
    count = -(-SIMULATED_ROWS // shard.num_rows)
    shards = [shard.model_copy(update={"name": f"{number:06d}_{shard.name}"}) for number in range(count)]
    rows = count * shard.num_rows
    sizes = {
        "num_rows": rows,
        "num_tokens": count * shard.num_tokens,
        "num_padding_tokens": 0,
        "num_validation_rows": 0,
    }
    source = small.sources[0].model_copy(update=sizes)
    big = small.model_copy(update=sizes | {"sources": [source], "shards": shards, "validation": None})
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(big.model_dump_json())
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    reader = StoreReader(folder)
    schedule = LaneSchedule((RowRange(rows),), big.rows_per_group, 512, seed=0)
    schedule.rows_at(0)
    load_s = time.perf_counter() - started
    memory = psutil.Process().memory_info().rss - before
    seconds = []
    first_rows = np.arange(count) * shard.num_rows
    for step in np.random.default_rng(0).integers(0, 3 * rows // 512, 8).tolist():
        wanted = np.unique(np.searchsorted(first_rows, schedule.rank_rows_at(step, 3, 64), side="right") - 1)
        permutations.cache_clear()
        for number in wanted.tolist():
            (folder / shards[number].name).unlink(missing_ok=True)
            (folder / shards[number].name).symlink_to(store / shard.name)
        started = time.perf_counter()
        for _ in reader.read_rows(schedule.rank_rows_at(step, 3, 64)).split(8):
            pass
        seconds.append(time.perf_counter() - started)
    return {"rows": rows, "load_s": load_s, "memory_mib": memory / MIB, "worst_first_step_s": max(seconds)}


def say(line: str) -> None:
    """Prints at once."""
    print(line, flush=True)


def sample_documents(folder: Path, share: float) -> list[str]:
    """Every so many-th document of a written corpus."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.open("rb"))
    return [json.loads(line)["text"] for line in itertools.islice(lines, 0, None, max(1, round(1 / share)))]


def sample_of(texts: list[str], num_chars: int) -> list[str]:
    """Whole documents of about so many characters, from the beginning."""
    taken: list[str] = []
    for text in texts:
        taken.append(text)
        num_chars -= len(text)
        if num_chars < 0:
            break
    return taken


def make_questions(texts: list[str]) -> list[BenchmarkText]:
    """Some that the corpus holds, and 250,000 n-grams of random ones."""
    held = [BenchmarkText(str(number), text[5000:5060]) for number, text in enumerate(texts) if len(text) > 1e5]
    codes = np.random.default_rng(0).integers(0x4E00, 0x9FA0, (5_000, 62)).tolist()
    return held + [BenchmarkText(f"random {number}", "".join(map(chr, row))) for number, row in enumerate(codes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Parquet files with a `text` column")
    parser.add_argument("--mib", type=int, default=64, help="size of the corpus whose build is timed")
    parser.add_argument("--memory-mib", type=int, default=0, help="size of the corpus whose build's memory is measured")
    parser.add_argument("--sample-share", type=float, default=0.2, help="of that corpus, for the bare tokenizer")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--reader-steps", type=int, default=256)
    parser.add_argument(
        "--consumption", type=float, default=1815, help="tokens/s a training consumes; the quick start's"
    )
    parser.add_argument("--out", type=Path, help="write the results to this Markdown file")
    args = parser.parse_args()
    packages = ("ray", "tokenizers", "fastokens", "pyarrow", "numpy")
    machine = {**describe_machine(*packages), "load_average": os.getloadavg()}
    say(json.dumps(machine, indent=2))
    with tempfile.TemporaryDirectory(prefix="lpc") as name:
        results = measure_all(args, Path(name))
    report = render_report(machine, results)
    say(report)
    if args.out is not None:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(report)


def measure_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every measurement, in the order the report gives them."""
    import ray

    texts = load_texts(args.data)
    train_tokenizer(
        sample_of(texts, 4_000_000), vocab_size=args.vocab_size, out_dir=folder / "tokenizer", max_length=4096
    )
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    write_corpus(texts, folder / "raw", args.mib * MIB)
    sample = sample_documents(folder / "raw", args.sample_share)
    questions = make_questions(texts)
    config = CorpusConfig(
        sources=[SourceConfig(path=str(folder / "raw"))], seq_len=args.seq_len, num_workers=2, num_cpus_per_worker=0.5
    )
    results: dict[str, Any] = {}

    def note(name: str, value: dict[str, Any]) -> None:
        results[name] = value
        say(f"{name}: {value}")

    note("interleaved", measure_interleaved(config, tokenizer.read_text(), questions, folder / "interleaved"))
    ask_for_token(os.environ, "token", make=True)
    stay_on_loopback(os.environ)
    options = {"include_dashboard": False, "logging_level": "ERROR", "_temp_dir": tempfile.mkdtemp(prefix="lpr")}
    ray.init(address="local", num_cpus=2, _node_ip_address=LOOPBACK, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for library in LIBRARIES:
        with BareTurns(tokenizer.read_text(), sample) as bare:
            chosen = config.model_copy(update={"tokenizer_library": library})
            note(f"build, {library}", measure_build(chosen, tokenizer, folder / f"store_{library}", questions, bare))
        note(f"bare beside {library}", bare.describe())
    store = folder / "store_auto"
    assert Manifest.load(store).shards == Manifest.load(folder / "store_tokenizers").shards, "the libraries differ"
    note("reader", measure_reader(store, args.reader_steps))
    del sample
    if args.memory_mib:
        shutil.rmtree(folder / "raw")
        write_corpus(texts, folder / "raw", args.memory_mib * MIB)
        note("large build", measure_build(config, tokenizer, folder / "large", questions))
    ray.shutdown()
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process, whose memory only grows
        note("resume", pool.apply(measure_resume, (store, folder / "simulated")))
    for library, key in itertools.product(LIBRARIES, ("tokens_per_s", "tokens_per_cpu_s")):
        ratio = results[f"build, {library}"][key] / results[f"bare beside {library}"][key]
        results[f"build, {library}, over bare, {key}"] = ratio
    results["consumption, tokens_per_s"] = args.consumption
    results["reader over consumption"] = results["reader"]["tokens_per_s"] / args.consumption
    return results


def render_report(machine: dict[str, Any], results: dict[str, Any]) -> str:
    """The result file: a table of the claims, then everything measured."""
    interleaved, resume = results["interleaved"], results["resume"]
    peak = max(
        value["peak_pss_gib"] for value in results.values() if isinstance(value, dict) and "peak_pss_gib" in value
    )
    rows = []
    for library in LIBRARIES:
        title, middle = f"build, tokenizer_library={library}, over bare tokenizers", interleaved[library]
        rows += [
            (
                f"{title}, interleaved, CPU time",
                f"{middle['ratio']:.2f} ({middle['lower_quartile']:.2f} .. {middle['upper_quartile']:.2f})",
            ),
            (f"{title}, two processes on Ray, wall", f"{results[f'build, {library}, over bare, tokens_per_s']:.2f}"),
            (
                f"{title}, CPU time of the whole Ray cluster",
                f"{results[f'build, {library}, over bare, tokens_per_cpu_s']:.2f}",
            ),
        ]
    rows += [
        ("bare fastokens over bare tokenizers, CPU time", f"{interleaved['fastokens']['ratio']:.1f}"),
        ("peak memory of all processes of a build", f"{peak:.2f} GiB"),
        (
            f"reader over a consumption of {results['consumption, tokens_per_s']:,} tokens/s",
            f"{results['reader over consumption']:.0f} x",
        ),
        ("rows of the simulated store", f"{resume['rows']:,}"),
        ("its manifest and schedule loaded", f"{resume['load_s']:.2f} s, {resume['memory_mib']:.0f} MiB"),
        ("rows of a step there, the slowest of eight random positions", f"{resume['worst_first_step_s']:.2f} s"),
    ]
    machine = machine | {"load_average_at_the_end": os.getloadavg()}
    lines = ["# Corpus: build, reader, resume", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    for title, value in (("Machine", machine), ("Everything measured", results)):
        lines += ["", f"## {title}", "", "```json", json.dumps(value, indent=1), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
