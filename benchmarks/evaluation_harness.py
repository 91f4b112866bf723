"""lm-evaluation-harness on local questions, in its own interpreter: the peer's half of `benchmarks/evaluation.py`.

    HARNESS_PYTHON benchmarks/evaluation_harness.py --model FOLDER --data FOLDER --out FILE [--batch-size 32]

Nothing of this project is imported. `--data` holds `<benchmark>/<split>/<subject>.jsonl` with the column names the
harness's tasks expect; only where the questions lie is overridden, templates and scoring are the harness's own.
Writes one line per question: benchmark, subject, position, prompt, four log-likelihoods, prediction.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

TEMPLATES = {"ceval": "ceval/{prefix}{subject}.yaml", "cmmlu": "cmmlu/{prefix}{subject}.yaml"}
TASKS = {"ceval": ("ceval-valid_", "val"), "cmmlu": ("cmmlu_", "test")}


def list_tasks(data: Path) -> list[dict[str, object]]:
    tasks: list[dict[str, object]] = []
    for benchmark, (prefix, split) in TASKS.items():
        for path in sorted((data / benchmark / split).glob("*.jsonl")):
            files = {split: str(path)}
            dev = data / benchmark / "dev" / path.name
            if dev.exists():
                files["dev"] = str(dev)
            source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            template = Path(lm_eval.tasks.__file__).parent / TEMPLATES[benchmark].format(
                prefix=prefix, subject=path.stem
            )
            tasks.append({**load_yaml(template), **source})
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description="Score questions with lm-evaluation-harness.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--few-shot", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch_size)
    scored = simple_evaluate(
        model=model, tasks=list_tasks(args.data), num_fewshot=args.few_shot, log_samples=True, bootstrap_iters=0
    )
    with args.out.open("w", encoding="utf-8") as handle:
        for benchmark, (prefix, _) in TASKS.items():
            for task in sorted(name for name in scored["samples"] if name.startswith(prefix)):
                for sample in sorted(scored["samples"][task], key=lambda item: item["doc_id"]):
                    values = [float(response[0]) for response in sample["filtered_resps"]]
                    line = {
                        "benchmark": benchmark,
                        "subject": task.removeprefix(prefix),
                        "position": sample["doc_id"],
                        "prompt": sample["arguments"][0][0],
                        "continuations": [argument[1] for argument in sample["arguments"]],
                        "logprobs": values,
                        "predicted": "ABCD"[values.index(max(values))],
                    }
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
