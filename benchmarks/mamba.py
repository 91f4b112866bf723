"""A Nemotron layer by PyTorch and by mamba-ssm's kernels: milliseconds of forward and backward, and peak memory.

    python benchmarks/mamba.py --device cuda --hidden 1024 --tokens 4096 --documents 1 8

One row, cut into documents of one length; random weights; bfloat16 on a GPU, float32 on a CPU. The time is the median of
the repetitions, by events in the stream on a GPU; memory is the peak above what weights, their gradients and the row take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_torch
from torch import Tensor

from layerplan.models.hybrid.config import HybridConfig
from layerplan.models.hybrid.mamba_kernels import find_kernel_fault
from layerplan.models.hybrid.mamba_mixer import set_mamba_kernels
from layerplan.models.hybrid.nemotron import Documents, NemotronLayer

PATHS = {"torch": ("torch", False), "torch compiled": ("torch", True), "triton": ("triton", False)} | {
    "triton compiled": ("triton", True)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", nargs="+", type=int, default=[1, 8], help="documents of the row, each a case")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = {"machine": describe_torch(args.device), "cases": []}
    print(json.dumps(report["machine"]), flush=True)
    for count in args.documents:
        for name in args.paths:
            kernels, compiles = PATHS[name]
            fault = find_kernel_fault(kernels, device.type)
            if fault is not None:
                print(f"{name}: {fault}", flush=True)
                continue
            case = {"path": name, "documents": count, **measure(args, device, kernels, compiles, count)}
            report["cases"].append(case)
            print(
                "  ".join(f"{key} {value:.1f}" if key != "path" else value for key, value in case.items()), flush=True
            )
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(report) + "\n")


def measure(
    args: argparse.Namespace, device: torch.device, kernels: str, compiles: bool, count: int
) -> dict[str, float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = HybridConfig(hidden_size=args.hidden, layer_kinds=["nemotron"], initializer_range=0.02)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layer = NemotronLayer(config, 0).to(device, dtype)
    set_mamba_kernels(layer, kernels)
    forward = torch.compile(layer.forward, dynamic=False) if compiles else layer.forward
    states = torch.randn(1, args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    index = torch.arange(args.tokens, device=device)[None] * count // args.tokens
    documents = None if count == 1 else Documents(index)

    def run() -> None:
        forward(states, documents=documents).sum().backward()

    for _ in range(3):
        run()
    if device.type == "cpu":
        return {"ms": statistics.median(time_on_cpu(run) for _ in range(args.repeat))}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = [time_on_gpu(run) for _ in range(args.repeat)]
    kept = measure_kept(lambda: forward(states, documents=documents))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": statistics.median(times), "peak_mib": peak / 2**20, "kept_kib_per_token": kept / 1024 / args.tokens}


def time_on_cpu(run: Callable[[], None]) -> float:
    start = time.thread_time()
    run()
    return (time.thread_time() - start) * 1e3


def time_on_gpu(run: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def measure_kept(forward: Callable[[], Tensor]) -> int:
    """Bytes that are there after a forward pass and were not before: what waits for the backward pass, and the output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = forward()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del output
    return kept


if __name__ == "__main__":
    main()
