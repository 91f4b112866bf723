"""Attention on packed rows: seconds of every backend over the length of documents.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --device cpu --seq-len 1024 --lengths 64 256 1024 --dtype bfloat16
    python benchmarks/attention.py --device cuda --batch 2 --lengths 64 256 512 1024 2048 4096

Each row is cut into documents of one length. The floor is the arithmetic that documents ask for (two products forward, five
backward, half of each square) at the measured rate of a matrix product; a dense mask pays for the whole square of the row.
Forward and backward together: on a CPU the best of five, on a GPU the mean of five, compiled as in layers, and the time of
the device alone, which is kept busy until all is launched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import describe_torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerplan.plan.model_shape import ModelShape
from layerplan.train.attention import time_attention
from layerplan.train.throughput import measure_matmul_flops

SHAPES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"head_dim": 64},
    "cuda": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"head_dim": 128},
}
BACKENDS = {"cpu": ("sdpa", "segmented", "blocks"), "cuda": ("sdpa", "flex", "varlen")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "vocab_size": 1000,
        "max_position_embeddings": 8192,
    } | SHAPES[args.device]
    shape = ModelShape.from_hf_config(config)
    rate = measure_matmul_flops(device, dtype)
    report = {"machine": describe_torch(args.device), "matmul_tflops": rate / 1e12, "cases": []}
    print(json.dumps(report["machine"] | {"matmul_tflops": rate / 1e12}), flush=True)
    for length in args.lengths:
        flops = 7 * args.batch * args.seq_len * length * shape.num_attention_heads * shape.head_dim
        case = {"length": length, "floor_ms": flops / rate * 1e3}
        settings = (shape, args.seq_len, args.batch, device, dtype, args.seq_len // length)
        for name in BACKENDS[args.device]:
            case[f"{name}_ms"] = time_attention(name, *settings, compiled=args.device == "cuda") * 1e3
        if length == args.seq_len:
            case |= time_whole_rows(args.device, settings)
        report["cases"].append(case)
        print("  ".join(f"{key} {value:.3g}" for key, value in case.items()), flush=True)
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(report) + "\n")


def time_whole_rows(device: str, settings: tuple) -> dict[str, float]:  # type: ignore[type-arg]
    """The plain causal kernels that need no mask."""
    found = {}
    backends = [SDPBackend.FLASH_ATTENTION] + [SDPBackend.CUDNN_ATTENTION] * (device == "cuda")
    for backend in backends:
        with sdpa_kernel([backend]):
            try:
                found[f"causal_{backend.name.split('_')[0].lower()}_ms"] = (
                    time_attention("causal", *settings, compiled=device == "cuda") * 1e3
                )
            except RuntimeError as error:
                print(f"{backend.name}: {str(error).splitlines()[0]}", flush=True)
    return found


if __name__ == "__main__":
    main()
