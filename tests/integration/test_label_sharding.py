"""Rows with start layers on two gloo workers: sharded and whole, each step that of one plain loop over all rows.

The test starts this file twice as a program; each copy is one worker and checks itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.ray_script import run_two_workers

STARTS = (0, 0, 1, 3, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 0, 2)
"""Of 17 rows, four a step: steps of one start layer and of several, shares of unequal size, a last step of one row."""
NUM_LAYERS = 4
PLACEMENTS = (("replicate", "replicate"), ("shard", "replicate"), ("shard", "shard"))
LOSSES = ("vocabulary", "semantic_ce")


def test_two_sharded_workers_equal_a_plain_loop() -> None:
    outputs = run_two_workers(__file__)
    assert outputs[0].count("case ok") == len(PLACEMENTS) * len(LOSSES)


def train(placement: tuple[str, str], loss: str, rank: int) -> tuple[dict[str, Any], Any]:
    """This worker's part of a training; the parameters whole, and what the loop came to."""
    import numpy as np
    import torch

    from layerplan.corpus.label_order import LabelOrder
    from layerplan.models.freezing import apply_plan, hf_name
    from layerplan.plan.placement import Placement
    from layerplan.train.label_step import LabelLossModel
    from layerplan.train.loop import run_loop
    from layerplan.train.loop_setup import LoopHooks, LoopSetup
    from layerplan.train.optim import build_optimizer
    from layerplan.train.request import LabelOptions
    from layerplan.train.sharding import place_model
    from layerplan.train.state import TrainState
    from tests.qwen3 import build_tiny_qwen3
    from tests.tiny_labels import PLAIN, draw, plan_all

    everything, order = draw(list(STARTS)), LabelOrder(STARTS, 4, seed=0)
    config = PLAIN.model_copy(
        update={"max_steps": order.steps_per_epoch, "num_workers": 2, "micro_batch_size": 1, "log_every_steps": 1}
    )
    model, plan = build_tiny_qwen3(num_hidden_layers=NUM_LAYERS).train(), plan_all(NUM_LAYERS)
    applied = apply_plan(model, plan)
    placed = place_model(
        model,
        plan,
        config,
        Placement(*placement),
        world_size=2,
        device=torch.device("cpu"),
        loss_model=partial(LabelLossModel, options=LabelOptions(loss)),  # type: ignore[arg-type]
    )
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)

    def rows_of_step(step: int):  # type: ignore[no-untyped-def]
        share = order.rank_rows_at(step, rank, 2)
        return order.fill(share, everything.select(np.maximum(share, 0)))

    hooks = LoopHooks(
        lambda start, stop: map(rows_of_step, range(start, stop)), lambda state: None, lambda: False, None, None
    )
    setup = LoopSetup(placed, optimizer, applied, config, torch.device("cpu"), rank, 2)
    counted = placed.model.start_counting(TrainState(), 2)
    state = run_loop(setup, TrainState(), hooks)
    whole = {
        hf_name(name): (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in placed.model.named_parameters()
    }
    return whole, counted(state)


def main() -> None:
    import torch
    import torch.distributed as dist

    from layerplan.corpus.label_order import LabelOrder
    from layerplan.train.request import LabelOptions
    from tests.qwen3 import build_tiny_qwen3
    from tests.tiny_labels import draw, train_plainly

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    order, everything = LabelOrder(STARTS, 4, seed=0), draw(list(STARTS))
    steps = [everything.select(order.rows_at(step)) for step in range(order.steps_per_epoch)]
    for loss in LOSSES:
        plain = build_tiny_qwen3(num_hidden_layers=NUM_LAYERS)
        losses = train_plainly(plain, steps, LabelOptions(loss))  # type: ignore[arg-type]
        expected = dict(plain.named_parameters())
        for placement in PLACEMENTS:
            found, state = train(placement, loss, dist.get_rank())
            worst = max(float((found[name] - value.detach()).abs().max()) for name, value in expected.items())
            case = f"{placement} {loss}"
            assert worst < 1e-6, f"{case}: {worst}"
            assert abs(state.last_loss - losses[-1]) < 1e-5, case
            assert state.coverage_checks == 4, case
            assert state.propagated_rows == tuple(STARTS.count(layer) for layer in range(NUM_LAYERS)), case
            print(f"case ok {case}: {worst:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
