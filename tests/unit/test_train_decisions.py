"""Pure decisions around the step: schedules, stability, memory and placement, activation checkpointing, MFU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.train import ScheduleConfig, StabilityConfig, TrainConfig
from layerplan.errors import TrainingError
from layerplan.pipeline.summary import describe_change
from layerplan.plan.communication import predict_communication
from layerplan.plan.cost import count_trainable_params
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.memory import HEADROOM, choose_placement, estimate_memory, explain_shortage
from layerplan.plan.micro_batch import choose_micro_rows
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement, choose_layers, gradient_path
from layerplan.plan.policies import make_plan
from layerplan.train.ledger import LedgerWriter, hash_row_ids
from layerplan.train.schedule import compute_lr_scale
from layerplan.train.stability import StabilityMonitor
from layerplan.train.throughput import compute_mfu
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

QWEN = ModelShape.from_hf_config(QWEN3_0P6B)


def deep(boundary: int = 14) -> FreezePlan:
    return make_plan(FreezeDeepPlanConfig(boundary=boundary), model=QWEN3_0P6B_IDENTITY, shape=QWEN, profile=None)


def shallow(boundary: int = 14) -> FreezePlan:
    return make_plan(FreezeShallowPlanConfig(boundary=boundary), model=QWEN3_0P6B_IDENTITY, shape=QWEN, profile=None)


def test_warmup_reaches_the_peak_and_each_shape_ends_at_its_minimum() -> None:
    for kind in ("cosine", "linear", "wsd"):
        config = ScheduleConfig(type=kind, warmup_ratio=0.1, min_ratio=0.2)
        assert compute_lr_scale(0, 100, config) == pytest.approx(0.1)
        assert compute_lr_scale(9, 100, config) == 1.0
        assert compute_lr_scale(99, 100, config) == pytest.approx(0.2)
    assert compute_lr_scale(99, 100, ScheduleConfig(type="constant")) == 1.0


def test_wsd_holds_the_peak_until_its_decay() -> None:
    config = ScheduleConfig(type="wsd", warmup_ratio=0.0, decay_ratio=0.5)
    assert compute_lr_scale(49, 101, config) == 1.0
    assert compute_lr_scale(75, 101, config) == pytest.approx(0.5)


def judge(monitor: StabilityMonitor, loss: float, skipped: int = 0, rollbacks: int = 0) -> str:
    return monitor.judge(7, loss, 1.0, skipped=skipped, rollbacks=rollbacks).action


def test_nonfinite_steps_are_skipped_until_the_limit_then_stop() -> None:
    monitor = StabilityMonitor(StabilityConfig(on_nonfinite="skip", max_nonfinite=2))
    assert [judge(monitor, float("nan"), skipped=count) for count in range(3)] == ["skip", "skip", "stop"]


def test_a_spike_is_called_only_once_the_window_is_full() -> None:
    monitor = StabilityMonitor(StabilityConfig(on_spike="rollback", spike_window=5, spike_sigmas=4, max_rollbacks=1))
    assert judge(monitor, 9.0) == "apply"
    monitor.forget()
    for loss in (2.0, 2.1, 1.9, 2.0, 2.05):
        assert judge(monitor, loss) == "apply"
    assert judge(monitor, 5.0) == "rollback"
    assert judge(monitor, 5.0, rollbacks=1) == "stop"
    assert judge(monitor, 2.0) == "apply"


@pytest.mark.parametrize("policy", ["skip", "log"])
def test_a_lasting_level_is_a_spike_for_one_window_only(policy: str) -> None:
    """After as many steps in a row as the window has, the loss is taken as it is; spikes use up nothing of what is not finite."""
    monitor = StabilityMonitor(StabilityConfig(on_spike=policy, spike_window=5, spike_sigmas=4, max_nonfinite=0))
    for loss in (2.0, 2.1, 1.9, 2.0, 2.05):
        assert judge(monitor, loss) == "apply"
    events = [monitor.judge(step, 5.0, 1.0, skipped=0, rollbacks=0) for step in range(12)]
    left_out = "skip" if policy == "skip" else "apply"
    assert [each.action for each in events] == [left_out] * 4 + ["apply"] * 8
    assert [each.event for each in events] == ["loss_spike"] * 4 + ["loss_level"] + [""] * 7


def test_a_spike_between_others_begins_no_level() -> None:
    monitor = StabilityMonitor(StabilityConfig(on_spike="skip", spike_window=5, spike_sigmas=4))
    for loss in [2.0, 2.1, 1.9, 2.0, 2.05] + [5.0, 2.0] * 10:
        judge(monitor, loss)
    assert max(monitor.recent) < 3


def test_gradient_path_starts_at_the_lowest_trained_layer() -> None:
    assert gradient_path(deep()) == tuple(range(28))
    assert gradient_path(shallow()) == tuple(range(14, 28))


def stored(plan: FreezePlan) -> dict[int, float]:
    """A trained layer stores 10 bytes, a frozen one 5."""
    return {layer: 10.0 if layer in plan.trainable_layers else 5.0 for layer in gradient_path(plan)}


def test_auto_checkpointing_recomputes_only_what_memory_asks_for() -> None:
    chosen = choose_layers(deep(), "auto", bytes_to_save=25.0, layer_bytes=stored(deep()))
    assert chosen == (0, 1, 2)
    many = choose_layers(deep(), "auto", bytes_to_save=145.0, layer_bytes=stored(deep()))
    assert many == tuple(range(15)), "frozen layers on the path follow once the trained ones are used up"
    everything = choose_layers(shallow(), "full", bytes_to_save=0, layer_bytes=stored(shallow()))
    assert everything == tuple(range(14, 28))


def test_a_small_model_on_a_large_device_is_replicated_without_recomputation() -> None:
    config = TrainConfig(num_workers=8, micro_batch_size=8)
    placement, estimate = choose_placement(
        deep(), QWEN, config, seq_len=4096, world_size=8, device_type="cuda", available_bytes=141e9
    )
    assert (placement.parallelism, placement.checkpointed_layers) == ("replicate", ())
    assert estimate.total < 141e9


def test_less_memory_means_recomputation_then_shards_then_a_refusal_that_helps() -> None:
    config = TrainConfig(num_workers=8, micro_batch_size=8, parallelism="auto")

    def place(gib: float) -> tuple[Placement, float]:
        placement, estimate = choose_placement(
            deep(), QWEN, config, seq_len=4096, world_size=8, device_type="cuda", available_bytes=gib * 2**30
        )
        return placement, estimate.total / 2**30

    some, _ = place(60)
    assert some.parallelism == "replicate"
    assert 0 < len(some.checkpointed_layers) < 28
    bare = estimate_memory(deep(), QWEN, config, some, seq_len=4096, world_size=8, device_type="cuda")
    tiny, total = place(2)
    assert (tiny.parallelism, tiny.frozen_sharding) == ("shard", "shard")
    assert total > 2
    message = explain_shortage(bare, 2 * 2**30, config)
    for wanted in ("2,147,483,648 bytes", "micro_batch_size", "activation_checkpointing", "frozen_sharding"):
        assert wanted in message


def test_gradients_that_add_up_are_whole_on_every_shard_or_sent_after_every_micro_batch() -> None:
    """Eight rows a worker: eight micro-batches hold four bytes a trained weight until the last, or send eight times."""
    plan, one = deep(), TrainConfig(num_workers=8, global_batch_size=64, micro_batch_size=8, parallelism="shard")
    eight, place = one.model_copy(update={"micro_batch_size": 1}), {"seq_len": 64, "world_size": 8}
    place |= {"device_type": "cuda"}
    trained = count_trainable_params(plan, QWEN)
    whole, pieces = Placement("shard", "shard"), Placement("shard", "shard", reduces_each=True)
    parameters = [
        estimate_memory(plan, QWEN, config, placement, **place).parameters
        for config, placement in ((one, whole), (eight, whole), (eight, pieces))
    ]
    assert parameters[1] - parameters[0] == pytest.approx(4 * trained * 7 / 8)
    assert parameters[2] == parameters[0]
    sent = [predict_communication(plan, QWEN, eight, placement, world_size=8).reduced for placement in (whole, pieces)]
    assert sent[1] == 8 * sent[0]

    def choose(gib: float, config: TrainConfig = eight) -> Placement:
        return choose_placement(plan, QWEN, config, available_bytes=gib * 2**30, **place)[0]

    fits = estimate_memory(plan, QWEN, eight, Placement("shard", "replicate"), **place).total / 2**30 / HEADROOM
    assert not choose(fits + 0.01).reduces_each
    assert choose(fits - 0.01) == Placement("shard", "replicate", reduces_each=True), "before anything is recomputed"
    assert not choose(fits - 0.01, one).reduces_each
    free = {"available_bytes": (fits - 0.01) * 2**30}
    auto = one.model_copy(update={"micro_batch_size": "auto"})
    assert choose_micro_rows(plan, QWEN, auto, **place, **free) > 1, "more rows at once send no oftener"


def test_a_frozen_prefix_stores_less_than_a_frozen_suffix() -> None:
    config = TrainConfig(micro_batch_size=4)
    place = Placement("replicate", "replicate")
    prefix, suffix = (
        estimate_memory(plan, QWEN, config, place, seq_len=1024, world_size=1, device_type="cuda").activations
        for plan in (shallow(), deep())
    )
    assert prefix < 0.6 * suffix


def test_mfu_counts_the_plans_flops_and_never_passes_one() -> None:
    assert compute_mfu(100.0, 2e9, peak_flops=1e12, num_workers=1) == pytest.approx(0.2)
    assert compute_mfu(1e6, 2e9, peak_flops=1e12, num_workers=1) == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_batch_size": 6, "num_workers": 4}, "multiple of num_workers"),
        ({"num_workers": 4, "num_replicas": 3}, "num_replicas=3 must divide"),
        ({"frozen_fp8": True}, "use_gpu"),
    ],
)
def test_contradictory_configs_are_refused_by_name(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig.model_validate(values)


def test_the_ledger_drops_steps_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path, start_step=0, rank=0, world_size=1)
    for step in (1, 2, 3):
        writer.write(step, np.array([step, 10 - step]))
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 4, "num')
    LedgerWriter(path, start_step=2, rank=0, world_size=1)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert hash_row_ids(np.array([3, 1])) == hash_row_ids(np.array([1, 3]))


def test_a_ledger_that_vanishes_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path, start_step=0, rank=0, world_size=1)
    writer.write(1, np.array([1]))
    path.unlink()
    with pytest.raises(TrainingError, match=r"ledger\.jsonl: was removed while the run went on"):
        writer.write(2, np.array([2]))


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (4.0, 3.0, "25 % lower"),
        (4.0, 5.0, "25 % higher"),
        (4.0, 3.99, "unchanged within 1 %"),
        (4.0, float("nan"), "not a number"),
    ],
)
def test_a_loss_that_rose_is_not_called_lower(first: float, last: float, words: str):
    assert describe_change(first, last) == words
