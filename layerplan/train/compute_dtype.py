"""`compute_dtype: auto` as a number: which of bfloat16 and float32 multiplies matrices faster where training will run.

Masters are float32 either way. bfloat16 is several times as fast on GPUs and on CPUs with AMX or AVX512-BF16, and a hundred
times slower on CPUs without, so nothing but a measurement can choose.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from layerplan.artifacts import write_text
from layerplan.config.train import TrainConfig
from layerplan.train.throughput import measure_matmul_flops

Dtype = Literal["float32", "bfloat16"]
MIN_GAIN = 1.2
"""bfloat16 has to be this much faster to be worth its rounding."""
SIZE = 512
"""Rows and columns of the matrices: without instructions for bfloat16 one product takes half a second."""


@dataclass(frozen=True)
class MeasuredDtype:
    """What was measured and what follows."""

    float32_gflops: float
    bfloat16_gflops: float

    @property
    def dtype(self) -> Dtype:
        """The dtype to compute in."""
        return "bfloat16" if self.bfloat16_gflops >= MIN_GAIN * self.float32_gflops else "float32"

    def __str__(self) -> str:
        return (
            f"compute dtype {self.dtype}: a core multiplies matrices at {self.bfloat16_gflops:,.3g} GFLOP/s in bfloat16,"
            f" {self.float32_gflops:,.3g} in float32"
        )

    def save(self, path: Path) -> None:
        """Writes the rates."""
        write_text(path, json.dumps(vars(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> MeasuredDtype:
        """Reads the rates."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def measure_in_task(config: TrainConfig) -> MeasuredDtype:
    """Measures both dtypes in a Ray task of a training worker's CPU share. Ray must be initialised."""
    import ray

    task = ray.remote(num_cpus=config.num_cpus_per_worker)(measure_dtypes)
    measured: MeasuredDtype = ray.get(task.remote())
    return measured


def measure_dtypes() -> MeasuredDtype:
    """Rates of this process on the CPU."""
    device = torch.device("cpu")
    rates = [
        measure_matmul_flops(device, dtype, SIZE, num_tries=tries) / 1e9
        for dtype, tries in ((torch.float32, 12), (torch.bfloat16, 3))
    ]
    return MeasuredDtype(*rates)


def settle_dtype(config: TrainConfig, path: Path) -> tuple[TrainConfig, MeasuredDtype | None]:
    """The config with its compute dtype settled; measured once per run, on CPUs alone, and read back from `path` later."""
    if config.compute_dtype != "auto" or config.use_gpu:
        return config.assume_dtype(), None
    measured = MeasuredDtype.load(path) if path.exists() else measure_in_task(config)
    if not path.exists():
        measured.save(path)
    return config.model_copy(update={"compute_dtype": measured.dtype}), measured
