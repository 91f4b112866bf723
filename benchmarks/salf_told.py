"""How much of its label a row's own layer gives away, on any model: by deviation and by which states pass the final norm.

    python benchmarks/salf_told.py jobs/configs/finetune_ceval.yaml --model /path/to/model --rows 100

The end-of-freezing layer is measured with the basis of the row's own label. Where it says more of the label than chance would,
Algorithm 4, which trains shallow start layers first, shows a model one class after the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from salf_race import share_told, share_told_by_chance
from salf_tables import markdown

from eval.label_encoding import encode_task
from eval.label_tasks import load_task
from layerplan.config.load import load_config
from layerplan.models.ref import ModelRef
from layerplan.pipeline.label_stages import make_samples
from layerplan.plan.row_starts import find_eof_layer
from layerplan.tracer.samples import measure_here


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rows", type=int, default=100, help="training rows at most")
    parser.add_argument("--set", action="append", default=[], help="as of layerplan")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(args.config, [f"model.name={args.model}", f"finetune.task.max_train={args.rows}", *args.set])
    assert config.finetune is not None
    model = ModelRef(args.model)
    limits = {"max_tokens": config.finetune.task.max_tokens, "max_positions": model.max_positions()}
    samples = make_samples(encode_task(load_task(config.finetune.task), model.tokenizer(), **limits).train)
    rows = []
    for norm in ("hf", "all", "none"):
        records = measure_here(model, samples, config.trace.model_copy(update={"deviation_norm": norm}))
        labels = [record["label_id"] for record in records]
        for kind in ("cosine", "ce", "rank"):
            eof = [find_eof_layer(record[f"deviation_{kind}"]) for record in records]
            layers = ", ".join(f"{layer}: {eof.count(layer)}" for layer in sorted(set(eof)))
            told = [share_told(labels, eof), share_told_by_chance(labels, eof)]
            rows.append([norm, kind, *(f"{each:.0%}" for each in told), layers])
    print(f"{len(samples)} rows of {config.finetune.task.type}\n")
    print(markdown(["final norm on", "deviation", "own layer tells", "by chance", "rows by own layer"], rows))


if __name__ == "__main__":
    main()
