"""Numbers a person trusts: tokens per second, MFU on the plan's own FLOPs, time per phase, hours and cost to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from layerplan.config.train import TrainConfig
from layerplan.durations import render_duration
from layerplan.plan.cluster_rates import KNOWN_PEAK_TFLOPS
from layerplan.plan.cost import GIB


@dataclass
class Window:
    """Sums since the last log line; seconds are host time."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - started

    @property
    def step_s(self) -> float:
        """Mean seconds per step."""
        return self.seconds / max(self.steps, 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the global batch per second."""
        return self.tokens / max(self.seconds, 1e-9)


def compute_mfu(tokens_per_s: float, flops_per_token: float, *, peak_flops: float, num_workers: float) -> float:
    """Share of the workers' peak rate spent on the plan's own FLOPs, at most 1.

    Args:
        tokens_per_s: Over all workers.
        flops_per_token: Forward and backward of this plan, causal attention counted exactly.
        peak_flops: One worker's peak, FLOP/s.
        num_workers: Workers, as a mean where their number changed.
    """
    return min(1.0, tokens_per_s * flops_per_token / (peak_flops * num_workers))


def find_peak_flops(config: TrainConfig, device: torch.device) -> float:
    """One worker's peak rate in FLOP/s: from the config, the data sheet of a known GPU, or measured."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type == "cuda" and config.compute_dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for key, value in KNOWN_PEAK_TFLOPS.items():
            if key in name:
                return value * 1e12
    return measure_matmul_flops(device, getattr(torch, config.compute_dtype))


def measure_matmul_flops(
    device: torch.device,
    dtype: torch.dtype,
    size: int = 1024,
    clock: Callable[[], float] = time.perf_counter,
    num_tries: int = 12,
) -> float:
    """Best rate of a square matrix product in FLOP/s, over a few tries; about 0.2 s on a CPU."""
    size = size if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(num_tries):
        started = clock()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - started)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def render_progress(
    step: int, config: TrainConfig, *, loss: float, rate: float, window: Window, mfu: float, num_workers: int
) -> str:
    """The console line of rank 0."""
    left_s = (config.max_steps - step) * window.step_s
    line = (
        f"step {step}/{config.max_steps}  loss {loss:.4f}  lr {rate:.2e}  {window.tokens_per_s:,.0f} tokens/s"
        f"  MFU {mfu:.1%}"
    )
    if step == 1:  # it includes the start-up of every engine and says nothing about the rest
        return line
    line += f"  {render_duration(left_s)} left"
    if config.usd_per_worker_hour:
        line += f"  {left_s / 3600 * num_workers * config.usd_per_worker_hour:,.2f} USD to go"
    return line
