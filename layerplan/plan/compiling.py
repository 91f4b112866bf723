"""`train.compile: auto` as a yes or no, and why: a pure function of what is known before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from layerplan.config.train import TrainConfig

CPU_FLOPS_PER_S = 200e9
"""What a core with bfloat16 units reaches: on slower ones steps take longer and compiling pays sooner."""
CPU_SAVED_SHARE = 0.2
"""Of an eager step in bfloat16 on a CPU, what compiling saves at least of the plans that were measured (docs/log.md)."""
CPU_COMPILE_S = 15.0
"""Seconds a first step takes longer where C++ is compiled anew: 4 to 17, by how many kinds of layers there are."""
WORTH = 2.0
"""How many times over what compiling takes has to be saved."""


@dataclass(frozen=True)
class CompileChoice:
    """What was decided and why."""

    compiles: bool
    reason: str

    def __str__(self) -> str:
        return f"compile {'on' if self.compiles else 'off'} (auto: {self.reason})"


def choose_compile(
    config: TrainConfig, *, flops_per_step: float, num_steps: float, varies: str = "", fault: str = ""
) -> CompileChoice:
    """Settles `auto`.

    Args:
        config: Training section, its compute dtype settled.
        flops_per_step: Forward and backward, of one worker.
        num_steps: Steps that one compilation serves: of the run, or of a phase of its plan.
        varies: Why rows have lengths of their own, each of which would be compiled anew; empty when all have one.
        fault: Why nothing can be compiled here; empty when it can.
    """
    if fault or varies:
        return CompileChoice(False, fault or varies)
    if config.use_gpu:
        return CompileChoice(True, "a GPU")
    if config.compute_dtype == "float32":
        return CompileChoice(False, "in float32 on a CPU it would round sums otherwise")
    saved_s = CPU_SAVED_SHARE * num_steps * flops_per_step / CPU_FLOPS_PER_S
    compiles = saved_s >= WORTH * CPU_COMPILE_S
    return CompileChoice(
        compiles,
        f"{num_steps:,.0f} steps are predicted to save {saved_s:,.0f} s, compiling takes {CPU_COMPILE_S:.0f} s",
    )
