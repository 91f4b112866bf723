"""C-Eval and CMMLU by letter log-probabilities: this project against lm-evaluation-harness, question for question.

    LAYERPLAN_DATA=... python benchmarks/evaluation.py --harness PYTHON [--vocab-size 32000] [--out FILE.md]
    LAYERPLAN_DATA=... python benchmarks/evaluation.py --harness PYTHON --model FOLDER --few-shot 5 --every 10 --subjects-every 15

`PYTHON` is an interpreter that has lm_eval 0.4.13. Both sides score all 12,928 questions, or some of each subject and some
subjects, with one model built from a seed (4 layers, 128 wide) or a pre-trained one in a folder, each in a process of its
own with one thread; a process's CPU seconds include its imports and the loading of the model. Asserted: equal prompts, equal
predictions on every question. Printed: the ratio of CPU seconds, the tokens that went through our model, and the fewest that
could: what a subject's prompts share once, and each prompt's own. The peer runs between two runs of ours.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import ROOT, render_machine

from eval.items import Benchmark, Question, load_benchmark
from layerplan.config.evaluation import BenchmarkConfig

SPLITS = {"ceval": "val", "cmmlu": "test"}
POSITIONS = 4096


def build_model(folder: Path, data: Path, vocab_size: int) -> None:
    """The model of the comparison: tokenizer from the Chinese corpus, weights from a seed."""
    import pyarrow.parquet as pq

    from layerplan.config.model import ScratchModelConfig
    from layerplan.models.scratch import build_scratch_model, train_tokenizer

    config = ScratchModelConfig(
        vocab_size=vocab_size,
        num_layers=4,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.05,
    )
    files = sorted((data / "zh").glob("*.parquet"))
    texts = [text for path in files for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, out_dir=folder, max_length=POSITIONS)
    build_scratch_model(config, tokenizer, folder, seed=7)


class Part(NamedTuple):
    """Which questions are asked."""

    max_questions: int | None
    """The first so many of each subject, if not all."""
    every: int
    """Of those every so many-th."""
    subjects_every: int
    """Of every so many-th subject of each benchmark."""

    def take(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[: self.max_questions : self.every]


def write_harness_data(data: Path, out: Path, part: Part) -> None:
    """The same questions as JSON lines under the column names of the harness's tasks."""
    for benchmark, split in SPLITS.items():
        names = {"question": "question", "answer": "answer"}
        if benchmark == "cmmlu":
            names = {"question": "Question", "answer": "Answer"}
        for kind in (split, "dev"):
            (out / benchmark / kind).mkdir(parents=True, exist_ok=True)
            for path in sorted((data / benchmark / kind).glob("*.csv"))[:: part.subjects_every]:
                with path.open(encoding="utf-8", newline="") as handle:
                    rows: Sequence[dict[str, str]] = list(csv.DictReader(handle))
                rows = part.take(rows) if kind == split else rows
                renamed = [{names.get(key, key): row[key] for key in (*"ABCD", *names)} for row in rows]
                lines = [json.dumps(row, ensure_ascii=False) for row in renamed]
                (out / benchmark / kind / f"{path.stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def choose_questions(benchmark: Benchmark, part: Part) -> Benchmark:
    """The part of a benchmark."""
    questions: list[Question] = []
    for subject in benchmark.subjects[:: part.subjects_every]:
        questions += part.take([item for item in benchmark.questions if item.subject == subject])
    return replace(benchmark, questions=tuple(questions))


def score_ours(model: str, data: Path, out: Path, few_shot: int, part: Part) -> None:
    """Our half, in this process: what an engine actor does, without a cluster around it."""
    import torch

    from eval.encoding import encode_prompts, find_answer_tokens
    from eval.engine import EngineSpec
    from eval.logits import TransformersEngine
    from eval.prompts import TEMPLATES, format_prompts
    from eval.scoring import pick_letter
    from layerplan.models.causal_lm import load_tokenizer
    from layerplan.models.ref import ModelRef

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    whole = [
        load_benchmark(BenchmarkConfig(name=name, path=str(data / name)), num_few_shot=few_shot) for name in SPLITS
    ]
    benchmarks = [choose_questions(benchmark, part) for benchmark in whole]
    prompts = [prompt for benchmark in benchmarks for prompt in format_prompts(benchmark, style="lm_eval")]
    template = TEMPLATES["lm_eval", "ceval"]
    tokens = find_answer_tokens(tokenizer, model, cue="\n" + template.cue, prefix=template.answer_prefix)
    encoded = encode_prompts(tokenizer, prompts, add_special_tokens=True, control_tokens="token")
    ids = [[*found, *tokens.appended] for found in encoded]
    engine = TransformersEngine(EngineSpec(ModelRef(model), "transformers", "float32", 0, tokens.letters, POSITIONS))
    started = time.process_time()
    answers = engine.ask(ids, [1] * len(ids))
    asking_s = time.process_time() - started
    questions = [question for benchmark in benchmarks for question in benchmark.questions]
    with out.open("w", encoding="utf-8") as handle:
        for question, prompt, answer in zip(questions, prompts, answers, strict=True):
            line = {"id": question.id, "prompt": prompt, "logprobs": answer.letter_logprobs}
            handle.write(
                json.dumps(line | {"predicted": pick_letter(answer.letter_logprobs)}, ensure_ascii=False) + "\n"
            )
    by_subject: dict[str, list[list[int]]] = defaultdict(list)
    for question, prompt_ids in zip(questions, ids, strict=True):
        by_subject[f"{question.category} {question.subject} {question.subject_zh}"].append(prompt_ids)
    counts = {
        "prompt_tokens": sum(map(len, ids)),
        "computed_tokens": engine.reader.tokens_computed,
        "fewest_tokens": sum(map(count_fewest, by_subject.values())),
        "asking_s": asking_s,
    }
    print(json.dumps(counts))


def count_fewest(prompts: Sequence[list[int]]) -> int:
    """Tokens of a subject's prompts when what all of them share is counted once."""
    shared = next((at for at, column in enumerate(zip(*prompts)) if len(set(column)) > 1), min(map(len, prompts)))
    return shared + sum(len(ids) - shared for ids in prompts)


def run_measured(command: list[str], env: dict[str, str]) -> tuple[float, str]:
    """CPU seconds of a process and its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; questions may hold U+2028, at which `splitlines` would cut."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def compare(ours: Path, harness: Path) -> dict[str, float]:
    """Counts of questions, of differing prompts and predictions, and the largest difference of a letter's log-likelihood.

    Each side's are taken relative to its letter A: where " A" is two tokens, ours leave out what all four share.
    """
    mine, theirs = (read_lines(path) for path in (ours, harness))
    assert len(mine) == len(theirs), (len(mine), len(theirs))
    pairs = list(zip(mine, theirs))
    return {
        "questions": len(pairs),
        "prompts_differ": sum(a["prompt"] != b["prompt"] for a, b in pairs),
        "predictions_differ": sum(a["predicted"] != b["predicted"] for a, b in pairs),
        "largest_difference": max(
            abs((x - a["logprobs"][0]) - (y - b["logprobs"][0]))
            for a, b in pairs
            for x, y in zip(a["logprobs"], b["logprobs"])
        ),
    }


def record(path: Path, harness: Path, ours: Path, model: Path, args: argparse.Namespace) -> None:
    """The harness's answers by question, for a test that has no harness."""
    from layerplan.models.files import hash_weight_files

    theirs, mine = (read_lines(file) for file in (harness, ours))
    answers = {
        f"{a['benchmark']}/{b['id']}": {"predicted": a["predicted"], "logprobs": [round(x, 6) for x in a["logprobs"]]}
        for a, b in zip(theirs, mine, strict=True)
    }
    assert (args.every, args.subjects_every) == (1, 1), "the test knows max_questions only"
    values = {"lm_eval": harness_version(args), "max_questions": args.max_questions}
    values |= {"weights_sha256": hash_weight_files(model), "answers": answers}
    path.write_text(json.dumps(values, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


def harness_version(args: argparse.Namespace) -> str:
    code = "import lm_eval; print(lm_eval.__version__)"
    return subprocess.check_output([args.harness, "-c", code], text=True).strip()


def describe(args: argparse.Namespace, found: dict[str, float], cpu_s: dict[str, list[float]], ours: str) -> str:
    peer = harness_version(args)
    stats = json.loads(ours.strip().splitlines()[-1])
    ratio = sum(cpu_s["ours"]) / len(cpu_s["ours"]) / cpu_s["harness"][0]
    which = "--model FOLDER" if args.model else f"--vocab-size {args.vocab_size}"
    command = f"python benchmarks/evaluation.py --harness PYTHON {which}"
    command += f" --few-shot {args.few_shot}" if args.few_shot else ""
    command += "".join(f" {word}" for word in name_part(args))
    rows = [
        ("questions", f"{found['questions']:,}"),
        ("prompts that differ", found["prompts_differ"]),
        ("predictions that differ", found["predictions_differ"]),
        ("largest difference of a log-likelihood, relative to A's", f"{found['largest_difference']:.2g}"),
        ("CPU s, ours", ", ".join(f"{value:.1f}" for value in cpu_s["ours"])),
        (f"CPU s, lm-evaluation-harness {peer}, batch size {args.batch_size}", f"{cpu_s['harness'][0]:.1f}"),
        ("ratio", f"{ratio:.3f}"),
        ("of ours, asking alone, in the last run", f"{stats['asking_s']:.1f}"),
        ("prompt tokens", f"{stats['prompt_tokens']:,}"),
        ("fewest tokens, a subject's beginning once", f"{stats['fewest_tokens']:,}"),
        ("tokens through our model, padding and the comparison included", f"{stats['computed_tokens']:,}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# C-Eval and CMMLU by letters, {name_model(args)}, {args.few_shot}-shot\n\n"
        f"{render_machine('torch', 'transformers', command=command, lm_eval=peer)}\n\n"
        f"One thread each.\n\n| measured | |\n|---|---|\n{table}\n"
    )


def name_part(args: argparse.Namespace) -> list[str]:
    """The options that choose questions, as they are given."""
    chosen = {"--max-questions": args.max_questions, "--every": args.every, "--subjects-every": args.subjects_every}
    return [word for name, value in chosen.items() if value not in (None, 1) for word in (name, str(value))]


def name_model(args: argparse.Namespace) -> str:
    return str(args.model.name) if args.model else f"{args.vocab_size:,} vocabulary entries"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with lm-evaluation-harness on all questions.")
    parser.add_argument("--harness", help="interpreter with lm_eval 0.4.13")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--few-shot", type=int, default=0)
    parser.add_argument("--max-questions", type=int, help="first so many of each subject")
    parser.add_argument("--every", type=int, default=1, help="every so many-th question of each subject")
    parser.add_argument("--subjects-every", type=int, default=1, help="every so many-th subject of each benchmark")
    parser.add_argument("--batch-size", type=int, default=32, help="of the harness, whose logits are of every position")
    parser.add_argument("--out", type=Path, help="Markdown file for the result")
    parser.add_argument("--model", type=Path, help="score this model instead of building one")
    parser.add_argument("--record", type=Path, help="file for the harness's answers, which a test compares with")
    parser.add_argument("--keep", type=Path, help="folder for model, data and answers")
    parser.add_argument("--ours", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = Path(os.environ["LAYERPLAN_DATA"])
    part = Part(args.max_questions, args.every, args.subjects_every)
    if args.ours:
        score_ours(args.ours[0], data, Path(args.ours[1]), args.few_shot, part)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        model = args.model or work / "model"
        if not (model / "model.safetensors").exists():
            build_model(model, data, args.vocab_size)
        write_harness_data(data, work / "data", part)
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        env |= {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
        options = ["--few-shot", str(args.few_shot)]
        ours = [sys.executable, __file__, "--ours", str(model), str(work / "ours.jsonl"), *options]
        ours += name_part(args)
        peer = [args.harness, str(ROOT / "benchmarks/evaluation_harness.py"), "--model", str(model), *options]
        peer += ["--data", str(work / "data"), "--out", str(work / "harness.jsonl")]
        peer += ["--batch-size", str(args.batch_size)]
        cpu_s: dict[str, list[float]] = {"ours": [], "harness": []}
        for side in ("ours", "harness", "ours"):
            path = str(ROOT) if side == "ours" else ""
            seconds, output = run_measured(ours if side == "ours" else peer, env | {"PYTHONPATH": path})
            cpu_s[side].append(seconds)
        found = compare(work / "ours.jsonl", work / "harness.jsonl")
        text = describe(args, found, cpu_s, output)
        print(text)
        if args.record:
            record(args.record, work / "harness.jsonl", work / "ours.jsonl", model, args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text, encoding="utf-8")
        assert found["prompts_differ"] == found["predictions_differ"] == 0


if __name__ == "__main__":
    main()
