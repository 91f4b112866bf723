"""What the peers of `training.py` train: a model, a plan, and rows of tokens."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.freezing import apply_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.throughput import find_peak_flops, measure_matmul_flops

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "vocab_size": 151936},
}


@dataclass(frozen=True)
class Case:
    """One comparison: a model, a plan, and the token rows every peer trains on."""

    base: nn.Module
    plan: FreezePlan
    shape: ModelShape
    rows: np.ndarray
    document_ids: np.ndarray
    """Of the tokens of one step's rows, the same in every step; only our loop keeps documents apart."""
    batch: int
    steps: int
    device: torch.device
    dtype: str
    peak: float
    """FLOP/s, one number for all cases of a run."""

    @property
    def seq_len(self) -> int:
        return int(self.rows.shape[-1])

    def fresh_model(self) -> nn.Module:
        import copy

        model = copy.deepcopy(self.base)
        apply_plan(model, self.plan)
        return model.train()


def build_case(args: argparse.Namespace, plan_type: str, split_ratio: Fraction, peak: float) -> Case:
    base = load_causal_lm(str(args.model), dtype=torch.float32) if args.model else build_random_model(args)
    shape = ModelShape.from_hf_config(base.config.to_dict())
    identity = ModelIdentity(
        name=args.model.name if args.model else args.shape,
        model_type=base.config.model_type,
        num_layers=shape.num_layers,
    )
    ratio = float(split_ratio)
    plan_config = {
        "full": FullPlanConfig(),
        "freeze_deep": FreezeDeepPlanConfig(split_ratio=ratio),
        "freeze_shallow": FreezeShallowPlanConfig(split_ratio=ratio),
    }[plan_type]
    plan = make_plan(plan_config, model=identity, shape=shape, profile=None)
    size = (args.steps, args.batch, args.seq_len)
    rows = read_rows(args.model, size) if args.model else draw_rows(shape.vocab_size, size)
    documents = cut_documents(args.documents, (args.batch, args.seq_len))
    return Case(base, plan, shape, rows, documents, args.batch, args.steps, torch.device(args.device), args.dtype, peak)


def build_random_model(args: argparse.Namespace) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    values = {"vocab_size": args.vocab_size, "max_position_embeddings": max(1024, args.seq_len)} | SHAPES[args.shape]
    with torch.device(args.device):
        model = Qwen3ForCausalLM(Qwen3Config(**values)).float()
    return model.cpu()  # what peers copy takes no memory of theirs


def draw_rows(vocab_size: int, size: tuple[int, int, int]) -> np.ndarray:
    """Token ids in a Zipf-like draw, so that the loss falls as it does on text."""
    weights = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(0).choice(vocab_size, size=size, p=weights / weights.sum())


def cut_documents(number: int, size: tuple[int, int]) -> np.ndarray:
    """Ids of so many documents a row, of lengths that random cuts leave."""
    cuts = np.zeros(size, dtype=np.int32)
    random = np.random.default_rng(0)
    for row in cuts:
        row[random.choice(np.arange(1, size[1]), size=number - 1, replace=False)] = 1
    return np.cumsum(cuts, axis=1, dtype=np.int32)


def read_rows(model: Path, size: tuple[int, int, int]) -> np.ndarray:
    """Token ids of Python's language reference, one topic after another."""
    from pydoc_data.topics import topics

    ids = load_tokenizer(str(model))("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    return np.array(ids[: int(np.prod(size))]).reshape(size)


def find_peak(device: torch.device, dtype: str) -> float:
    """Peak FLOP/s: of the data sheet on a known GPU, else the best measured in two seconds by the same clock as the steps."""
    if device.type == "cuda":
        return find_peak_flops(TrainConfig(), device)
    return max(measure_matmul_flops(device, getattr(torch, dtype), clock=time.process_time) for _ in range(10))
