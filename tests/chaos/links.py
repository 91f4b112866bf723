"""What `layerplan plan scale` says of a link, held against gloo over a link of known width between two hosts.

    sudo -E python -m tests.chaos.links

The file is also the program of each worker: with RANK in its environment it is that rank of two.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.network_hosts import Network, running_hosts, why_not

MBITS = (100.0, 40.0)
STEPS = 5
TOLERANCE = 0.15
BATCH, SEQ_LEN, VOCAB = 2, 8, 64
PLANS = ("full", "freeze_shallow")
PARALLELISMS = {"replicate": "replicate", "shard": "shard over all"}


def compare() -> int:
    """Prints what a narrower link costs beside what was predicted; 1 when they are more than 15 % apart.

    Everything trained and half, replicated and sharded; what a step takes beside its communication falls out.
    """
    if fault := why_not():
        print(f"skipped: {fault}")
        return 0
    with tempfile.TemporaryDirectory(prefix="lplinks") as folder, running_hosts(2, Path(folder)) as network:
        wide, narrow = (measure(network, mbits, Path(folder)) for mbits in MBITS)
    print(f"| case | s a step at {MBITS[0]:g} Mb/s | at {MBITS[1]:g} | more | predicted | |\n|---|---|---|---|---|---|")
    is_near = True
    for case in wide:
        plan, parallelism = case.split()
        predicted = predict(plan, parallelism, MBITS[1]) - predict(plan, parallelism, MBITS[0])
        more = narrow[case] - wide[case]
        is_near &= abs(more / predicted - 1) <= TOLERANCE
        print(
            f"| {case} | {wide[case]:.2f} | {narrow[case]:.2f} | {more:.2f} | {predicted:.2f} | {more / predicted - 1:+.0%} |"
        )
    return 0 if is_near else 1


def measure(network: Network, mbits: float, folder: Path) -> dict[str, float]:
    """Seconds of a step of each case, over a link of this width."""
    first, second = network.hosts
    second.limit(mbits)
    port = str(29500 + int(mbits))
    running = []
    for rank, host in enumerate((first, second)):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": first.address, "MASTER_PORT": port}
        running.append(host.start(sys.executable, __file__, output=folder / f"{rank}.txt", **env))
    for rank, process in enumerate(running):
        assert process.wait(timeout=300) == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    found: dict[str, float] = json.loads((folder / "0.txt").read_text().splitlines()[-1])
    return found


def make_config() -> dict[str, Any]:
    from tests.qwen3 import QWEN3_0P6B

    small = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return QWEN3_0P6B | small | heads


def make_plan_and_shape(name: str) -> tuple[Any, Any]:
    from layerplan.config.plan import FreezeShallowPlanConfig, FullPlanConfig
    from layerplan.models.model_sizes import make_model_shape
    from layerplan.plan.layer_profile import ModelIdentity
    from layerplan.plan.policies import make_plan

    shape = make_model_shape(make_config())
    model = ModelIdentity(name="m", model_type="qwen3", num_layers=4)
    chosen = FullPlanConfig() if name == "full" else FreezeShallowPlanConfig(boundary=2)
    return make_plan(chosen, model=model, shape=shape), shape


def make_train_config(parallelism: str) -> Any:
    from layerplan.config.train import TrainConfig

    return TrainConfig(
        max_steps=STEPS, global_batch_size=BATCH, micro_batch_size=1, num_workers=2, compute_dtype="float32",
        parallelism=parallelism, log_every_steps=1,
    )  # fmt: skip


def predict(plan_name: str, parallelism: str, mbits: float) -> float:
    """Seconds of communication in a step."""
    from layerplan.plan.cluster_rates import REACHED_GLOO, assume_cpus
    from layerplan.plan.scale import predict_scale

    plan, shape = make_plan_and_shape(plan_name)
    rates = replace(assume_cpus(), between=REACHED_GLOO * mbits * 1e6 / 8, memory=1e12)
    points = predict_scale(plan, shape, make_train_config(parallelism), rates, seq_len=SEQ_LEN, nodes=2)
    (point,) = (each for each in points if each.placement.startswith(PARALLELISMS[parallelism]))
    return point.exposed_s


class StepTimes:
    """Keeps how long steps took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "perf/step_s" in metrics:
            self.seconds.append(metrics["perf/step_s"])

    def log_event(self, name: str, step: int, message: str) -> None: ...


def train(plan_name: str, parallelism: str, rank: int) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from layerplan.corpus.rows import PackedRows
    from layerplan.models.freezing import apply_plan
    from layerplan.plan.placement import Placement
    from layerplan.train.loop import run_loop
    from layerplan.train.loop_setup import LoopHooks, LoopSetup
    from layerplan.train.optim import build_optimizer
    from layerplan.train.sharding import place_model
    from layerplan.train.state import TrainState

    torch.manual_seed(0)
    values = make_config()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).train()
    plan, _ = make_plan_and_shape(plan_name)
    config = make_train_config(parallelism)
    applied, device = apply_plan(model, plan), torch.device("cpu")
    placement = Placement(parallelism, "replicate")
    placed = place_model(model, plan, config, placement, world_size=2, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        for step in range(start, stop):
            ids = np.random.default_rng((step, rank)).integers(0, VOCAB, (1, SEQ_LEN), dtype=np.int32)
            columns = np.arange(SEQ_LEN, dtype=np.int32)[None]
            yield PackedRows(np.array([2 * step + rank]), ids, np.zeros_like(ids), columns)

    times = StepTimes()
    hooks = LoopHooks(
        iter_steps, lambda state: None, lambda: False, times if rank == 0 else None, None, say=lambda line: None
    )
    run_loop(LoopSetup(placed, optimizer, applied, config, device, rank, 2), TrainState(), hooks)
    return statistics.median(times.seconds[1:]) if times.seconds else 0.0


def main() -> None:
    """One worker."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found = {f"{plan} {parallelism}": train(plan, parallelism, rank) for plan in PLANS for parallelism in PARALLELISMS}
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main() if "RANK" in os.environ else compare())
