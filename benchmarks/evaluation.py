"""C-Eval and CMMLU by letter log-probabilities: this project against lm-evaluation-harness, question for question.

    LAYERPLAN_DATA=... python benchmarks/evaluation.py --harness PYTHON [--vocab-size 32000] [--out FILE.md]
    LAYERPLAN_DATA=... python benchmarks/evaluation.py --harness PYTHON --model FOLDER --max-questions 1

`PYTHON` is an interpreter that has lm_eval 0.4.13. Both sides score all 12,928 questions, or the first of each subject,
with one model built from a seed (4 layers, 128 wide) or a pre-trained one in a folder, each in a process of its own with
one thread; a process's CPU seconds include its imports and the loading of the model. Asserted: equal prompts, equal
predictions on every question. Printed: the ratio of CPU seconds and the share of padding. The peer runs between two runs
of ours.
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
from pathlib import Path
from typing import Any

from machine import ROOT, render_machine

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


def write_harness_data(data: Path, out: Path, max_questions: int | None) -> None:
    """The same questions as JSON lines under the column names of the harness's tasks."""
    for benchmark, split in SPLITS.items():
        names = {"question": "question", "answer": "answer"}
        if benchmark == "cmmlu":
            names = {"question": "Question", "answer": "Answer"}
        for kind in (split, "dev"):
            (out / benchmark / kind).mkdir(parents=True, exist_ok=True)
            for path in sorted((data / benchmark / kind).glob("*.csv")):
                with path.open(encoding="utf-8", newline="") as handle:
                    rows = list(csv.DictReader(handle))[: max_questions if kind == split else None]
                renamed = [{names.get(key, key): row[key] for key in (*"ABCD", *names)} for row in rows]
                lines = [json.dumps(row, ensure_ascii=False) for row in renamed]
                (out / benchmark / kind / f"{path.stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def score_ours(model: str, data: Path, out: Path, few_shot: int, max_questions: int | None) -> None:
    """Our half, in this process: what an engine actor does, without a cluster around it."""
    import torch

    from eval.encoding import encode_prompts, find_answer_tokens
    from eval.engine import EngineSpec
    from eval.items import load_benchmark
    from eval.logits import MAX_BATCH_TOKENS, iter_equal_lengths
    from eval.open_engine import open_engine
    from eval.prompts import TEMPLATES, format_prompts
    from eval.scoring import pick_letter
    from layerplan.config.evaluation import BenchmarkConfig
    from layerplan.models.causal_lm import load_tokenizer
    from layerplan.models.ref import ModelRef

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    benchmarks = [
        load_benchmark(
            BenchmarkConfig(name=name, path=str(data / name), max_questions=max_questions), num_few_shot=few_shot
        )
        for name in SPLITS
    ]
    prompts = [prompt for benchmark in benchmarks for prompt in format_prompts(benchmark, style="lm_eval")]
    template = TEMPLATES["lm_eval", "ceval"]
    tokens = find_answer_tokens(tokenizer, model, cue="\n" + template.cue, prefix=template.answer_prefix)
    encoded = encode_prompts(tokenizer, prompts, add_special_tokens=True, control_tokens="token")
    ids = [[*found, *tokens.appended] for found in encoded]
    spec = EngineSpec(ModelRef(model), "transformers", "float32", 0, tokens.letters, POSITIONS)
    answers = open_engine(spec).ask(ids, [1] * len(ids))
    questions = [question for benchmark in benchmarks for question in benchmark.questions]
    with out.open("w", encoding="utf-8") as handle:
        for question, prompt, answer in zip(questions, prompts, answers, strict=True):
            line = {"id": question.id, "prompt": prompt, "logprobs": answer.letter_logprobs}
            handle.write(
                json.dumps(line | {"predicted": pick_letter(answer.letter_logprobs)}, ensure_ascii=False) + "\n"
            )
    batches = list(iter_equal_lengths(ids, [1] * len(ids), max_tokens=MAX_BATCH_TOKENS["cpu"]))
    computed = sum(len(batch) * max(len(ids[index]) for index in batch) for batch in batches)
    wanted = sum(map(len, ids))
    print(json.dumps({"prompt_tokens": wanted, "padding_share": 1 - wanted / computed, "batches": len(batches)}))


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
    command += f" --max-questions {args.max_questions}" if args.max_questions else ""
    rows = [
        ("questions", f"{found['questions']:,}"),
        ("prompts that differ", found["prompts_differ"]),
        ("predictions that differ", found["predictions_differ"]),
        ("largest difference of a log-likelihood, relative to A's", f"{found['largest_difference']:.2g}"),
        ("CPU s, ours", ", ".join(f"{value:.1f}" for value in cpu_s["ours"])),
        (f"CPU s, lm-evaluation-harness {peer}, batch size 32", f"{cpu_s['harness'][0]:.1f}"),
        ("ratio", f"{ratio:.3f}"),
        ("prompt tokens", f"{stats['prompt_tokens']:,} in {stats['batches']:,} forward passes"),
        ("padding", f"{stats['padding_share']:.1%}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# C-Eval and CMMLU by letters, {name_model(args)}, {args.few_shot}-shot\n\n"
        f"{render_machine('torch', 'transformers', command=command, lm_eval=peer)}\n\n"
        f"One thread each.\n\n| measured | |\n|---|---|\n{table}\n"
    )


def name_model(args: argparse.Namespace) -> str:
    return str(args.model.name) if args.model else f"{args.vocab_size:,} vocabulary entries"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with lm-evaluation-harness on all questions.")
    parser.add_argument("--harness", help="interpreter with lm_eval 0.4.13")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--few-shot", type=int, default=0)
    parser.add_argument("--max-questions", type=int, help="first so many of each subject")
    parser.add_argument("--out", type=Path, help="Markdown file for the result")
    parser.add_argument("--model", type=Path, help="score this model instead of building one")
    parser.add_argument("--record", type=Path, help="file for the harness's answers, which a test compares with")
    parser.add_argument("--keep", type=Path, help="folder for model, data and answers")
    parser.add_argument("--ours", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = Path(os.environ["LAYERPLAN_DATA"])
    if args.ours:
        score_ours(args.ours[0], data, Path(args.ours[1]), args.few_shot, args.max_questions)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        model = args.model or work / "model"
        if not (model / "model.safetensors").exists():
            build_model(model, data, args.vocab_size)
        write_harness_data(data, work / "data", args.max_questions)
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        env |= {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
        options = ["--few-shot", str(args.few_shot)]
        ours = [sys.executable, __file__, "--ours", str(model), str(work / "ours.jsonl"), *options]
        ours += ["--max-questions", str(args.max_questions)] if args.max_questions else []
        peer = [args.harness, str(ROOT / "benchmarks/evaluation_harness.py"), "--model", str(model), *options]
        peer += ["--data", str(work / "data"), "--out", str(work / "harness.jsonl")]
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
