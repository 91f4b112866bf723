"""Training speed: ours against transformers.Trainer and a plain Accelerate loop, same model, data, plan and machine.

    OMP_NUM_THREADS=1 python benchmarks/training.py --plans full freeze_deep freeze_shallow --vocab-size 32000
    OMP_NUM_THREADS=1 python benchmarks/training.py --model FOLDER --dtype float32
    python benchmarks/training.py --shape qwen3-0.6b --device cuda --batch 8 --seq-len 4096 --split-ratios 1/3 1/2 2/3

The model has a shape and random weights and trains on tokens drawn like words; a pre-trained one in a folder trains on
the texts of Python's language reference. On a CPU steps of the peers are interleaved (A B C A B C ...), each in a process
of its own that runs only when it is its turn, and a step costs that process's CPU time, which a busy machine distorts less
than the wall clock. On a GPU, whose memory does not hold all peers, each runs its steps in one go, as users see it, and a
step lasts from one event in the stream to the next. Ratios are medians over the steps after warm-up, with quartiles. It
needs torch, transformers, pydantic and numpy; Trainer and Accelerate are left out, and said to be, when `accelerate` is
missing, and `torchtitan` (0.2.2, `--peers ours torchtitan`) fails with its reason when that is.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_torch
from torch import nn
from training_case import SHAPES, Case, build_case, find_peak
from training_peers import PEERS, Rival, Watch

from layerplan.plan.cost import predict_cost
from layerplan.train.throughput import peak_memory_gib


def compare_on_gpu(case: Case, peers: list[str], warmup: int) -> dict[str, Any]:
    """Runs peers one after another, from the same weights over the same rows; what they end with gives the same loss."""
    results: dict[str, Any] = {}
    flops = predict_cost(case.plan, case.shape, seq_len=case.seq_len).total_flops
    tokens = case.batch * case.seq_len
    for name in peers:
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        watch = Watch()
        try:
            model = PEERS[name](case, watch)
            seconds = watch.seconds[warmup:]
            peak_memory = peak_memory_gib(case.device)
            loss = measure_loss(model, case)
        except (torch.OutOfMemoryError, ImportError, RuntimeError, TypeError, AttributeError) as error:
            results[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            print(f"  {name:<18}{results[name]['failed']}", flush=True)
            continue
        finally:
            model = None
        median = statistics.median(seconds)
        results[name] = {
            "step_s": median,
            "quartiles_s": statistics.quantiles(seconds, n=4)[::2],
            "tokens_per_s": tokens / median,
            "mfu": tokens / median * flops / case.peak,
            "peak_memory_gib": peak_memory,
            "loss_after": loss,
        }
        if name != peers[0] and "step_s" in results.get(peers[0], {}):
            results[name]["ours_is_faster_by"] = median / results[peers[0]]["step_s"]
            results[name]["loss_difference"] = loss - results[peers[0]]["loss_after"]
        print(f"  {name:<18}" + "  ".join(_shown(key, value) for key, value in results[name].items()), flush=True)
    return results


@torch.no_grad()
def measure_loss(model: nn.Module, case: Case) -> float:
    """Of the last step's rows, by what a peer ended with, in bfloat16 and by the model's own code."""
    model.eval()
    model.set_attn_implementation("sdpa")
    total = 0.0
    for row in case.rows[-1]:
        ids = torch.from_numpy(row.astype(np.int64)).to(case.device)[None]
        with torch.autocast(case.device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), ids[0, 1:]))
    return total / len(case.rows[-1])


def compare(case: Case, make_case: Callable[[], Case], peers: list[str], warmup: int) -> dict[str, Any]:
    """Interleaves the peers and returns medians, quartiles, ratios and the largest loss difference."""
    rivals = {name: Rival(name, make_case) for name in peers}
    for step in range(case.steps):
        for rival in rivals.values():
            rival.take()
        shown = "  ".join(f"{name} {rival.seconds[-1]:.2f} s" for name, rival in rivals.items())
        print(f"    step {step + 1}/{case.steps}  {shown}", flush=True)
        if step + 1 < case.steps:
            for rival in rivals.values():
                rival.expect_next()
    results: dict[str, Any] = {}
    flops = predict_cost(case.plan, case.shape, seq_len=case.seq_len).total_flops
    tokens = case.batch * case.seq_len
    for name, rival in rivals.items():
        kept = rival.seconds[warmup:]
        median = statistics.median(kept)
        losses, peak_memory = rival.finish()
        results[name] = {
            "step_s": median,
            "quartiles_s": statistics.quantiles(kept, n=4)[::2] if len(kept) > 1 else kept,
            "tokens_per_s": tokens / median,
            "mfu": tokens / median * flops / case.peak,
            "first_step_s": rival.seconds[0],
            "peak_memory_gib": peak_memory,
            "losses": losses,
        }
    for name in peers[1:]:
        ratios = [theirs / ours for ours, theirs in zip(rivals[peers[0]].seconds, rivals[name].seconds)][warmup:]
        results[name]["ours_is_faster_by"] = statistics.median(ratios)
        results[name]["ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios
        pairs = list(zip(results[peers[0]]["losses"], results[name]["losses"]))
        results[name]["largest_loss_difference"] = max((abs(a - b) for a, b in pairs), default=float("nan"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--model", type=Path, help="folder of a pre-trained model, for the shape with random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plans", nargs="+", default=["full", "freeze_deep", "freeze_shallow"])
    parser.add_argument("--split-ratios", nargs="+", type=Fraction, default=[Fraction(1, 2)])
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=["ours", "trainer", "accelerate"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--documents", type=int, default=1, help="a row, for our loop alone: peers have no such rows")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    if args.documents > 1 and args.peers != ["ours"]:
        parser.error("--documents: rows of several documents are --peers ours; the others would mix them")
    if args.device == "cpu":
        torch.set_num_threads(1)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("accelerate is not installed: Trainer and Accelerate are left out", flush=True)
        args.peers = [peer for peer in args.peers if peer == "ours"]
    peak = find_peak(torch.device(args.device), args.dtype)
    machine = {**describe_torch(args.device), "dtype": args.dtype, "matmul_tflops": peak / 1e12}
    report: dict[str, Any] = {"machine": machine, "cases": {}}
    print(json.dumps(report["machine"], indent=2), flush=True)
    for plan_type in args.plans:
        for ratio in args.split_ratios if plan_type != "full" else args.split_ratios[:1]:
            make_case = partial(build_case, args, plan_type, ratio, peak)
            case = make_case()
            name = f"{plan_type} {ratio} vocab {case.shape.vocab_size} seq {args.seq_len} batch {args.batch}"
            print(f"== {name}", flush=True)
            if args.device == "cuda":
                result = compare_on_gpu(case, args.peers, args.warmup)
            else:
                result = compare(case, make_case, args.peers, args.warmup)
            report["cases"][name] = result
            for peer, values in result.items():
                if isinstance(values, dict) and args.device == "cpu":
                    print(f"  {peer:<11}" + "  ".join(_shown(key, value) for key, value in values.items()), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(report) + "\n")


def _shown(key: str, value: Any) -> str:
    if key == "losses":
        return f"last loss {value[-1]:.4f}" if value else ""
    if isinstance(value, list):
        return f"{key} " + "..".join(f"{part:.3f}" for part in value)
    return f"{key} {value:.3f}"


if __name__ == "__main__":
    main()
