"""Prompts with a label, drawn: rows as a feed hands them to the loop, and the plain loop that a run must equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.config.finetune import LabelLoss
from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.request import LabelOptions
from tests.qwen3 import TINY_QWEN3

PLAIN = TrainConfig(
    max_steps=4,
    global_batch_size=4,
    micro_batch_size=2,
    compute_dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-4, max_grad_norm=0.5),
    schedule=ScheduleConfig(type="constant", warmup_ratio=0),
)
"""What `train_plainly` is written for."""


def plan_all(num_layers: int) -> FreezePlan:
    """Every decoder layer of the tiny model trains, and nothing else."""
    values = TINY_QWEN3 | {"num_hidden_layers": num_layers}
    model = ModelIdentity(name="tiny", model_type="qwen3", num_layers=num_layers)
    return make_plan(ExplicitPlanConfig(trainable=["0:"]), model=model, shape=ModelShape.from_hf_config(values))


def draw(starts: list[int], *, seed: int = 0, width: int = 9) -> PackedRows:
    """One row per start layer; prompts of 4 to 8 tokens, the label behind each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY_QWEN3["vocab_size"], (len(starts), width), dtype=np.int32)
    used = rng.integers(5, width + 1, len(starts)).astype(np.int32)
    rows = make_rows(np.arange(len(starts)), ids, [np.zeros(1, np.int32)] * len(starts), used)
    return replace(rows, start_layers=np.asarray(starts, dtype=np.int32))


def train_plainly(model: nn.Module, steps: list[PackedRows], options: LabelOptions) -> list[float]:
    """AdamW of PyTorch over one row at a time, its layers frozen by hand; the model is trained in place."""
    model.train()
    bases = torch.linalg.pinv(model.lm_head.weight.detach().double()).T
    layers = [list(layer.parameters()) for layer in model.model.layers]
    everything = [value for layer in layers for value in layer]
    groups = [[value for value in everything if (value.ndim > 1) == is_matrix] for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    losses = []
    for rows in steps:
        optimizer.zero_grad()
        total = 0.0
        for row, start in enumerate(rows.start_layers.tolist()):  # type: ignore[union-attr]
            model.requires_grad_(False)
            for layer in [start] if options.trains_alone else range(start, len(layers)):
                for value in layers[layer]:
                    value.requires_grad_(True)
            ids = torch.from_numpy(rows.input_ids[row][rows.document_ids[row] >= 0].astype(np.int64))
            loss = measure_plainly(model, ids, bases, options.loss) / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(everything, 0.5)
        optimizer.step()
        losses.append(total)
    return losses


def measure_plainly(model: nn.Module, ids: Tensor, bases: Tensor, loss: LabelLoss) -> Tensor:
    output = model(input_ids=ids[None, :-1], output_hidden_states=True)
    if loss == "vocabulary":
        return F.cross_entropy(output.logits[0, -1:], ids[-1:])
    state = output.hidden_states[-1][0, -1].double()
    if loss == "semantic_cosine":
        return 1 - F.cosine_similarity(state, bases[ids[-1]], dim=0)
    return F.cross_entropy(F.cosine_similarity(state[None], bases, dim=-1)[None], ids[-1:])
