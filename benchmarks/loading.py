"""Memory of eight workers that load a random model of 1.5 billion parameters and train its last quarter, and of the export.

    python benchmarks/loading.py [--workers 8] [--params 1.5e9] [--tokens 64] [--out RESULTS.md]

Workers are processes of their own over gloo on this host, built as a training worker builds its model (`build_model`, FSDP2,
bfloat16 base, frozen layers sharded). Memory is what Linux says of each process: `VmHWM`, the most it ever had resident,
shared pages of libraries included, set back between the phases. The bound is 1.3 times what a worker keeps plus 1 GiB: its
shards of weights and moments once it has loaded, of gradients too in a step; predicted is what `--dry-run` prints.
The checkpoint is written by the workers, the export by one process, in a temporary folder of some 8 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import ROOT, render_machine

GIB = 2**30
HIDDEN, FEED_FORWARD, VOCAB = 1024, 4096, 8192
LAYER_PARAMS = 3 * HIDDEN * FEED_FORWARD + 3 * HIDDEN * HIDDEN + 2 * HIDDEN + 256
"""Narrow layers: gloo reduces a layer's gradients through several float32 copies of them, on every worker."""


def make_config(num_params: float) -> dict[str, Any]:
    """A Qwen3 of so many parameters, a multiple of four layers."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": 4 * max(1, round((num_params - 2 * HIDDEN * VOCAB) / LAYER_PARAMS / 4)),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes random bfloat16 weights, one tensor in memory at a time."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig

    from layerplan.models.meta import build_without_memory
    from layerplan.models.safetensors_writer import promise_tensor, write_safetensors

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    values = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "dtype")}
    model = build_without_memory(AutoConfig.for_model("qwen3", **values), name="random")

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
        return (drawn + 1 if len(shape) == 1 else drawn).to(torch.bfloat16)

    promises = {
        name: promise_tensor(torch.bfloat16, value.shape, lambda name=name, value=value: draw(name, value.shape))
        for name, value in model.state_dict().items()
    }
    write_safetensors(folder / "model.safetensors", promises, {"format": "pt"})


def run_worker(work: Path, tokens: int) -> None:
    """Builds, trains a step, saves; writes what memory it took."""
    import torch
    import torch.distributed as dist

    from layerplan.checkpoint.dcp import save_checkpoint
    from layerplan.train import build
    from layerplan.train.sharding import reshard
    from layerplan.train.step import TensorBatch

    torch.set_num_threads(1)
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this worker goes first
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    request, shape = make_request(work, world_size)
    found = {"imports": read_peak()}
    dist.barrier()
    started = time.perf_counter()
    set_peak_back()
    place = {"rank": rank, "world_size": world_size, "local_world_size": world_size}
    build.find_available_bytes = lambda *_: float(2**40)  # what else runs on this machine does not matter here
    built = build.build_model(request, request.plan, shape, torch.device("cpu"), seq_len=tokens, **place)
    found["loading"], found["load_s"] = read_peak(), time.perf_counter() - started
    print(f"worker {rank}: {found['imports'] / GIB:.2f} GiB, {found['loading'] / GIB:.2f} once loaded", flush=True)
    set_peak_back()
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(rank))
    loss = built.placed.model(TensorBatch(ids, None, ids.roll(-1, 1), tokens), 1.0 / tokens)
    (loss / tokens).backward()
    built.optimizer.step(grad_scale=torch.ones(()))
    found["training"], found["loss"] = read_peak(), float(loss.detach()) / tokens
    reshard(built.placed.model)
    weights = list(built.placed.model.parameters())
    moments = [each for state in built.optimizer.state.values() for each in state.values()]
    gradients = [each.grad for each in weights if each.grad is not None]
    found |= {"weights": count_bytes(weights), "moments": count_bytes(moments), "gradients": count_bytes(gradients)}
    built.optimizer.zero_grad()
    save_checkpoint(work / "checkpoint", built.placed.model, built.optimizer, None)
    (work / f"worker_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count_bytes(tensors: list[Any]) -> int:
    """Of this worker's parts."""
    return sum(each.to_local().nbytes if hasattr(each, "to_local") else each.nbytes for each in tensors)


def run_export(work: Path) -> None:
    """Exports the checkpoint; writes what memory it took."""
    import torch

    from layerplan.checkpoint import hf_export

    torch.set_num_threads(1)
    request, _ = make_request(work, 1)
    hf_export.prove_checkpoint = lambda *_: ""  # type: ignore[assignment]  # no run around it, so no seal
    found = {"imports": read_peak()}
    set_peak_back()
    started = time.perf_counter()
    report = hf_export.export_hf(
        base=request.model, checkpoint=work / "checkpoint", out_dir=work / "export", plan=request.plan
    )
    found |= {"export": read_peak(), "export_s": time.perf_counter() - started, "changed": report.num_trained_changed}
    (work / "export.json").write_text(json.dumps(found))


def make_request(work: Path, world_size: int) -> tuple[Any, Any]:
    """The run: the last quarter of the layers trains, in bfloat16, everything sharded."""
    from layerplan.config.plan import FreezeShallowPlanConfig
    from layerplan.config.train import TrainConfig
    from layerplan.models.ref import ModelRef
    from layerplan.plan.loss_recipe import LossRecipe
    from layerplan.plan.policies import make_plan
    from layerplan.train.request import TrainRequest

    model = ModelRef(str(work / "base"))
    shape = model.shape()
    plan = make_plan(FreezeShallowPlanConfig(boundary=shape.num_layers * 3 // 4), model=model.identity(), shape=shape)
    config = TrainConfig(
        max_steps=1,
        num_workers=world_size,
        global_batch_size=world_size,
        micro_batch_size=1,
        compute_dtype="bfloat16",
        parallelism="shard",
        frozen_sharding="shard",
    )
    return TrainRequest(work, model, plan, work / "store", config, seed=0, recipe=LossRecipe()), shape


def read_peak() -> int:
    """Most bytes this process had resident since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def set_peak_back() -> None:
    """Begins a phase: the peak is what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def predict(work: Path, world_size: int, tokens: int) -> dict[str, float]:
    """What `--dry-run` says of the run."""
    from layerplan.plan.host_memory import estimate_host_memory
    from layerplan.plan.memory import estimate_memory
    from layerplan.plan.placement import Placement

    request, shape = make_request(work, world_size)
    run = (request.plan, shape, request.config, Placement("shard", "shard"))
    place = {"world_size": world_size, "device_type": "cpu"}
    host, memory = estimate_host_memory(*run, **place), estimate_memory(*run, seq_len=tokens, **place)
    return {"loading": host.loading, "export": host.export, "training": memory.total, "params": shape.total_params}


def start_workers(work: Path, count: int, tokens: int) -> list[dict[str, float]]:
    """Runs the workers beside each other and reads what they wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = make_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, __file__, "--part", "worker", "--work", str(work), "--tokens", str(tokens)]
    running = [subprocess.Popen(command, env=env | {"RANK": str(rank)}) for rank in range(count)]
    codes = [worker.wait() for worker in running]
    if any(codes):
        raise SystemExit("a worker failed")
    return [json.loads((work / f"worker_{rank}.json").read_text()) for rank in range(count)]


def make_environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def render(workers: list[dict[str, float]], export: dict[str, float], predicted: dict[str, float], tokens: int) -> str:
    """The table."""
    most = {key: max(worker[key] for worker in workers) for key in workers[0]}
    built = most["weights"] + most["moments"]
    limits = {"loading": 1.3 * built + GIB, "training": 1.3 * (built + most["gradients"]) + GIB}
    rows = [
        ("imports", most["imports"], None, None),
        ("loading", most["loading"], predicted["loading"], limits["loading"]),
        ("one step", most["training"], predicted["training"], limits["training"]),
        ("export, one process", export["export"], predicted["export"], None),
    ]
    table = "".join(
        f"| {name} | {peak / GIB:.2f} | {'' if guess is None else f'{guess / GIB:.2f}'} |"
        f" {'' if limit is None else f'{limit / GIB:.2f}'} |\n"
        for name, peak, guess, limit in rows
    )
    return (
        f"# Loading, one step and the export: memory of a process\n\n{render_machine('torch', 'transformers')}\n\n"
        f"{predicted['params']:,.0f} parameters, {len(workers)} workers over gloo on one host, the last quarter of the layers"
        f" trains, one row of {tokens} tokens each. The largest of the workers; GiB resident, pages of libraries"
        f" included.\n\n| phase | peak | predicted | bound |\n|---|---|---|---|\n{table}\n"
        f"A worker keeps {most['weights'] / GIB:.2f} GiB of weights, {most['moments'] / GIB:.2f} of moments and"
        f" {most['gradients'] / GIB:.2f} of gradients; it loaded in {most['load_s']:.0f} s. The export took"
        f" {export['export_s']:.0f} s and changed {export['changed']:.0f} tensors; the mean loss was"
        f" {sum(worker['loss'] for worker in workers) / len(workers):.3f}. A whole float32 copy of the model is"
        f" {predicted['params'] * 4 / GIB:.1f} GiB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--params", type=float, default=1.5e9)
    parser.add_argument("--tokens", type=int, default=64, help="in the one row of each worker")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("all", "worker", "export"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "worker":
        run_worker(args.work, args.tokens)
        return
    if args.part == "export":
        run_export(args.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "base", make_config(args.params))
        workers = start_workers(work, args.workers, args.tokens)
        command = [sys.executable, __file__, "--part", "export", "--work", str(work)]
        subprocess.run(command, env=make_environment(), check=True)
        export = json.loads((work / "export.json").read_text())
        text = render(workers, export, predict(work, args.workers, args.tokens), args.tokens)
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
