"""`layerplan finetune --dry-run`: the task, the rows of each start layer, and what they save; no weights, no cluster."""

from __future__ import annotations

from collections import Counter

from eval.label_tasks import load_task
from layerplan.config.load import dump_config
from layerplan.config.run import RunConfig
from layerplan.pipeline.dry_run import describe_model
from layerplan.pipeline.finetune import require_finetune
from layerplan.plan.policies import make_plan
from layerplan.plan.row_starts import choose_plan_config, choose_start_layers
from layerplan.plan.start_cost import compute_saving

TYPICAL_TOKENS = 64
"""Tokens of a row that FLOPs are counted for before anything is tokenized; shares hardly depend on it."""


def print_finetune_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, the task and its classes, and the saving by depth and by FLOPs.

    Raises:
        LayerplanError: When config, task or model do not fit together.
    """
    section = require_finetune(config)
    print(dump_config(config))
    task = load_task(section.task)
    for split in ("train", "test"):
        prompts = getattr(task, split)
        counts = Counter(item.label for item in prompts)
        print(f"{split:<7}{len(prompts):,} prompts: " + ", ".join(f"{name} {counts[name]:,}" for name in task.classes))
    print(f"task   {task.name}, sha256 {task.sha256[:12]}")
    identity, shape = describe_model(config)
    plan = make_plan(choose_plan_config(section), model=identity, shape=shape)
    rows = len(task.train)
    # which row starts where waits for the measurement; how many start where does not
    starts = choose_start_layers(section, plan, rows, [0] * rows, seed=config.seed)
    alone = section.method == "lift"
    saving = compute_saving(starts, plan, shape, seq_len=TYPICAL_TOKENS, trains_alone=alone)
    per_epoch = -(-rows // config.train.global_batch_size)
    print(f"steps  {section.epochs} epochs of {per_epoch:,}")
    print(f"saved  depth {saving.depth:.1%}, backward FLOPs {saving.flops:.1%} of the layers' (full training: 0 %)")
