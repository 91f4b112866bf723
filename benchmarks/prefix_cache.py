"""Three epochs with and without `train.cache_prefix`: CPU seconds of each epoch, and the same weights to the last bit.

    OMP_NUM_THREADS=1 python benchmarks/prefix_cache.py --dtype bfloat16

The real loop in one process over drawn rows of two documents, without Ray; the first epoch writes, the later ones read.
Seconds are of the process, its threads that read and write included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import render_machine
from layerplan.config.plan import FreezeShallowPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.models.freezing import apply_plan, compute_tensor_hashes
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.plan.prefix_cache import find_cut, price_prefix
from layerplan.train.loop import run_loop
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.optim import build_optimizer
from layerplan.train.place import LOGGING
from layerplan.train.prefix_cache import PrefixCache
from layerplan.train.prefix_pass import Prefix, find_prefix_fault
from layerplan.train.row_states import RowStates
from layerplan.train.sharding import place_model
from layerplan.train.state import TrainState

EPOCHS = 3
HEADINGS = (
    "| frozen layers | epoch without, s | first with, s | later with, s | later: without over with | predicted |"
    " all three epochs | disk |"
)


@dataclass(frozen=True)
class Outcome:
    """Of one training."""

    epoch_s: list[float]
    """CPU seconds."""
    weights: dict[str, str]
    """Hashes."""
    file_bytes: int = 0


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--boundary", type=int, nargs="+", default=[6, 9])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(render_machine("torch", "transformers"))
    print(f"{args.layers} layers, hidden {args.hidden}, {args.batch} x {args.seq_len} tokens a step, {args.dtype}\n")
    print(HEADINGS)
    print("|---|---|---|---|---|---|---|---|")
    for boundary in args.boundary:
        print(compare(args, boundary), flush=True)


def compare(args: argparse.Namespace, boundary: int) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        kept, plain = train(args, boundary, Path(folder)), train(args, boundary, None)
    assert kept.weights == plain.weights, "the weights differ"
    later = float(np.mean(kept.epoch_s[1:]))
    epoch = float(np.mean(plain.epoch_s))
    total = sum(plain.epoch_s) / sum(kept.epoch_s)
    return (
        f"| {boundary} of {args.layers} | {epoch:.2f} | {kept.epoch_s[0]:.2f} | {later:.2f} | {epoch / later:.2f}"
        f" | {predict(args, boundary):.2f} | {total:.2f} | {kept.file_bytes / 2**20:.1f} MiB |"
    )


def predict(args: argparse.Namespace, boundary: int) -> float:
    """FLOPs of a step over those without the prefix."""
    from layerplan.plan.cost import predict_cost

    plan, shape = plan_for(args, boundary)
    config = TrainConfig(max_steps=2, global_batch_size=1, compute_dtype=args.dtype)
    price = price_prefix(plan, shape, config, seq_len=1, num_rows=1, world_size=1, flops_per_s=1.0)
    whole = predict_cost(plan, shape, seq_len=args.seq_len).total_flops
    return whole / (whole - price.saved_s)


def make_config(args: argparse.Namespace) -> Qwen3Config:
    """A model of Qwen3's kind."""
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 128, "head_dim": 64}
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4, "vocab_size": 32_000}
    return Qwen3Config(num_hidden_layers=args.layers, tie_word_embeddings=True, **heads, **sizes)


def plan_for(args: argparse.Namespace, boundary: int):  # type: ignore[no-untyped-def]
    """The plan that freezes the layers below the boundary, and the model's sizes."""
    shape = ModelShape.from_hf_config(make_config(args).to_dict())
    identity = ModelIdentity(name="drawn", model_type="qwen3", num_layers=args.layers)
    return make_plan(FreezeShallowPlanConfig(boundary=boundary), model=identity, shape=shape), shape


def draw_rows(args: argparse.Namespace) -> PackedRows:
    """The rows of an epoch, two documents in each."""
    count, length = args.batch * args.steps, args.seq_len
    ids = np.random.default_rng(0).integers(0, 32_000, (count, length), dtype=np.int32)
    columns = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    start = length // 3
    positions = np.where(columns >= start, columns - start, columns).astype(np.int32)
    return PackedRows(np.arange(count), ids, (columns >= start).astype(np.int32), positions)


def train(args: argparse.Namespace, boundary: int, folder: Path | None) -> Outcome:
    """Three epochs, each in an order of its own."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(make_config(args), dtype=torch.float32).train()
    plan, _ = plan_for(args, boundary)
    steps = EPOCHS * args.steps
    config = TrainConfig(
        max_steps=steps,
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        compute_dtype=args.dtype,
        log_every_steps=10**6,
    )
    device = torch.device("cpu")
    applied = apply_plan(model, plan)
    placed = place_model(model, plan, config, Placement("replicate", "replicate"), world_size=1, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)
    cache = None
    if folder is not None:
        states = RowStates(
            folder / "rows.bin",
            circumstances="",
            row_shape=(args.seq_len, args.hidden),
            dtype=getattr(torch, args.dtype),
        )
        cache = PrefixCache(Prefix(model, find_cut(plan, args.layers)), states)
        place = {"rows": args.batch, "seq_len": args.seq_len, "device": device}
        assert find_prefix_fault(placed.model, cache.prefix, **place) == ""
    rows = draw_rows(args)
    orders = [np.random.default_rng(epoch).permutation(len(rows)) for epoch in range(EPOCHS)]

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        for step in range(start, stop):
            epoch, at = divmod(step, args.steps)
            yield rows.select(orders[epoch][at * args.batch : (at + 1) * args.batch])

    ends = [time.process_time()]

    def mark(part: str, step: int) -> None:
        if part == LOGGING and step % args.steps == 0:
            ends.append(time.process_time())

    hooks = LoopHooks(iter_steps, lambda state: None, lambda: False, None, None, mark=mark, say=lambda line: None)
    setup = LoopSetup(placed, optimizer, applied, config, device, 0, 1)
    run_loop(replace(setup, prefix=cache), TrainState(), hooks)
    size = 0 if cache is None else cache.states.path.stat().st_size
    if cache is not None:
        cache.close(is_done=True)
    return Outcome(np.diff(ends).tolist(), compute_tensor_hashes(dict(model.named_parameters())), size)


if __name__ == "__main__":
    main()
