"""`train.compile: auto` before the first step, with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from layerplan.config.train import TrainConfig
from layerplan.plan.compiling import choose_compile


@pytest.mark.parametrize(
    ("settings", "told", "expected"),
    [
        # a fifth of 150 s of arithmetic at 200 GFLOP/s is 30 s, twice what compiling takes
        (
            {},
            {"flops_per_step": 3e11, "num_steps": 100},
            "on (auto: 100 steps are predicted to save 30 s, compiling takes 15 s)",
        ),
        (
            {},
            {"flops_per_step": 3e11, "num_steps": 99},
            "off (auto: 99 steps are predicted to save 30 s, compiling takes 15 s)",
        ),
        ({"compute_dtype": "float32"}, {}, "off (auto: in float32 on a CPU it would round sums otherwise)"),
        ({"use_gpu": True}, {"num_steps": 1}, "on (auto: a GPU)"),
        ({"use_gpu": True}, {"varies": "rows vary"}, "off (auto: rows vary)"),
        ({}, {"varies": "rows vary", "fault": "no compiler"}, "off (auto: no compiler)"),
    ],
)
def test_auto_compiles_where_it_saves_twice_what_it_takes(
    settings: dict[str, Any], told: dict[str, Any], expected: str
) -> None:
    config = TrainConfig(**{"compute_dtype": "bfloat16", "use_gpu": False} | settings)
    choice = choose_compile(config, **{"flops_per_step": 1e15, "num_steps": 1000} | told)
    assert str(choice) == f"compile {expected}"
