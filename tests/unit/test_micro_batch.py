"""`micro_batch_size: auto`: what is predicted, what is kept, and memory that really runs out.

The last test starts this file as a program: a worker of one whose address space is limited, and one that is killed.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from torch import nn

from layerplan.config.load import validate_config
from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import ConfigError, TrainingError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.memory import HEADROOM, estimate_memory
from layerplan.plan.micro_batch import choose_micro_rows, list_sizes, settle_micro_rows
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.build import BuiltModel
from layerplan.train.known_rows import KnownRows, load_known
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.micro_batch import find_most_rows, try_step
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY, TINY_QWEN3
from tests.ray_script import run_script

QWEN = ModelShape.from_hf_config(QWEN3_0P6B)
AUTO = TrainConfig(global_batch_size=24, micro_batch_size="auto", num_workers=2)
ROOM_BYTES = 150 * 2**20
"""A row of the small model takes some 90 MiB, two do not fit beside its gradients."""
SIZES = TINY_QWEN3 | {"hidden_size": 128, "intermediate_size": 4096, "vocab_size": 128, "num_hidden_layers": 3}
SEQ_LEN = 512
SEQ_LEN_TRIED = 12


def plan_for(config: FreezeDeepPlanConfig | FreezeShallowPlanConfig) -> FreezePlan:
    return make_plan(config, model=QWEN3_0P6B_IDENTITY, shape=QWEN)


def choose(available: float, config: TrainConfig = AUTO, *, most: int | None = None, boundary: int = 14) -> int:
    plan = plan_for(FreezeShallowPlanConfig(boundary=boundary))
    limits = {"seq_len": 1024, "world_size": 2, "device_type": "cuda", "available_bytes": available}
    return choose_micro_rows(plan, QWEN, config, most=most, **limits)  # type: ignore[arg-type]


def predict(rows: int) -> float:
    """Bytes of so many rows, whole and with nothing recomputed."""
    plan, place = plan_for(FreezeShallowPlanConfig(boundary=14)), Placement("replicate", "replicate")
    config = settle_micro_rows(AUTO, rows)
    return estimate_memory(plan, QWEN, config, place, seq_len=1024, world_size=2, device_type="cuda").total / HEADROOM


def test_sizes_divide_a_workers_rows_and_end_where_more_tokens_gain_nothing() -> None:
    assert list_sizes(AUTO, world_size=2, seq_len=1024, device_type="cuda") == (1, 2, 3, 4, 6, 12)
    assert list_sizes(AUTO, world_size=2, seq_len=8192, device_type="cuda") == (1, 2, 3, 4)
    assert list_sizes(AUTO, world_size=2, seq_len=1024, device_type="cpu") == (1, 2)
    assert list_sizes(AUTO, world_size=2, seq_len=10**6, device_type="cpu") == (1,)
    assert list_sizes(AUTO, world_size=5, seq_len=1024, device_type="cuda") == (1, 5), "five of them, one has four rows"


def test_the_largest_size_that_fits_whole_is_taken_and_no_layer_is_recomputed_for_it() -> None:
    assert choose(1e15) == 12
    assert choose(predict(6) + 1) == 6 and choose(predict(6) - 1) == 4
    assert choose(predict(1) - 1) == 1, "recomputed, but one row it is"
    assert choose(1e15, most=5) == 4
    assert choose(1e15, AUTO.model_copy(update={"activation_checkpointing": "full"})) == 12


def test_a_config_takes_a_number_or_the_word() -> None:
    def make(**train: object) -> TrainConfig:
        return validate_config({"name": "n", "model": {"type": "pretrained", "name": "m"}, "train": train}).train

    assert (make().micro_batch_size, make().compile) == (1, "auto")
    auto = make(micro_batch_size="auto", compile=False, num_workers=2, global_batch_size=6)
    assert (auto.micro_batch_size, auto.micro_rows, auto.compile, auto.compiles) == ("auto", 1, False, False)
    assert make(**auto.model_dump()) == auto and make(compile=True).compiles and not make().compiles
    for wrong, said in (
        ({"micro_batch_size": 0}, "train.micro_batch_size: Input should be greater than or equal to 1 (got 0)"),
        ({"micro_batch_size": "all"}, "train.micro_batch_size: Input should be a valid integer"),
        ({"compile": "always"}, "train.compile: Input should be a valid boolean"),
        ({"micro_batch_size": "auto", "num_workers": 5}, "train: global_batch_size=64 must be a multiple of"),
    ):
        with pytest.raises(ConfigError) as refused:
            make(**wrong)
        (fault,) = refused.value.faults
        assert fault.startswith(said)


def test_what_was_tried_when_an_attempt_ended_is_halved_and_what_fitted_is_kept(tmp_path: Path) -> None:
    assert find_most_rows(tmp_path, 0, 1) is None
    for state, most in (("fits", 6), ("next", 6), ("trying", 3)):
        KnownRows(6, state).save(tmp_path)  # type: ignore[arg-type]
        assert load_known(tmp_path) == KnownRows(6, state) and find_most_rows(tmp_path, 0, 1) == most  # type: ignore[arg-type]
    KnownRows(1, "trying").save(tmp_path)
    assert find_most_rows(tmp_path, 0, 1) == 1
    for content in ('{"rows": 0, "state": "fits"}', '{"rows": 2}', "[]", "{"):
        (tmp_path / "micro_batch.json").write_text(content)
        with pytest.raises(TrainingError, match=r"micro_batch\.json: is no size of a micro-batch; remove it"):
            load_known(tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_was_tried_leaves_no_trace(dtype: str, has_labels: bool, optimizer: str) -> None:
    """Two steps after it end with the bits of two steps without it, prompts with labels and every optimizer included."""
    from layerplan.models.freezing import compute_tensor_hashes
    from layerplan.train.loop import run_loop
    from layerplan.train.state import TrainState
    from tests.qwen3 import build_tiny_qwen3

    hashes = []
    for is_tried in (False, True):
        model = build_tiny_qwen3()
        setup, hooks, built = make_built(model, dtype, has_labels, optimizer)
        if is_tried:
            assert try_step(built, SEQ_LEN_TRIED) is None
            assert all(value.grad is None for value in model.parameters())
        run_loop(setup, TrainState(), hooks)
        hashes.append(compute_tensor_hashes(dict(model.named_parameters())))
    assert hashes[0] == hashes[1] != compute_tensor_hashes(dict(build_tiny_qwen3().named_parameters()))


def make_built(
    model: nn.Module, dtype: str, has_labels: bool, optimizer: str
) -> tuple[LoopSetup, LoopHooks, BuiltModel]:
    """A loop of two steps, and its model as a worker has built it."""
    from functools import partial

    from layerplan.checkpoint.dcp import Parked
    from layerplan.plan.loss_recipe import LossRecipe
    from layerplan.plan.memory import MemoryEstimate
    from layerplan.train.label_step import LabelLossModel
    from layerplan.train.request import LabelOptions
    from layerplan.train.step import LossModel
    from tests.tiny_labels import draw, plan_all
    from tests.tiny_loop import make_loop, make_rows

    config = TrainConfig(
        max_steps=2,
        global_batch_size=4,
        micro_batch_size=2,
        compute_dtype=dtype,  # type: ignore[arg-type]
        optimizer={"type": optimizer, "learning_rate": 1e-2},  # type: ignore[arg-type]
    )
    plan = plan_all(3)
    setup, hooks = make_loop(
        model.train(),
        plan,
        config,
        rows_of_step=lambda step: (
            draw([0, 1, 2, 2], seed=step) if has_labels else make_rows(step, batch=4, vocab_size=40)
        ),
        loss_model=partial(LabelLossModel, options=LabelOptions()) if has_labels else LossModel,
    )
    placement, nothing = Placement("replicate", "replicate"), MemoryEstimate(0, 0, 0, 0)
    told = (nothing, 1e12, Parked(), LossRecipe(), config, setup.device, plan, has_labels)
    return setup, hooks, BuiltModel(setup.placed, setup.applied, setup.optimizer, placement, *told)


def test_a_worker_without_room_and_one_that_is_killed_train_on_fewer_rows(tmp_path: Path) -> None:
    """Four rows are predicted to fit. The system ends the first attempt; of the second's two rows one fits."""
    save_inputs(tmp_path)
    killed = run_script(__file__, tmp_path, "killed", timeout_s=120)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert load_known(tmp_path) == KnownRows(4, "trying")
    limited = run_script(__file__, tmp_path, "limited", timeout_s=120)
    assert limited.returncode == 0, limited.stdout
    assert "it tried 4 rows for the first time; 2 now" in limited.stdout
    assert "2 rows do not fit into memory; 1 at most" in limited.stdout
    assert "1 rows per forward pass, 2 steps" in limited.stdout
    assert load_known(tmp_path) == KnownRows(1, "fits")


def save_inputs(folder: Path) -> None:
    from tests.qwen3 import build_tiny_qwen3

    build_tiny_qwen3(**SIZES).save_pretrained(folder / "base")


def main() -> None:
    """A worker of one: builds the model as in a run, and trains two steps."""
    import logging
    import os
    import resource
    from functools import partial

    import torch
    import torch.distributed as dist

    from layerplan.models.files import identify_model
    from layerplan.models.ref import ModelRef
    from layerplan.plan.loss_recipe import LossRecipe
    from layerplan.train.build import build_model
    from layerplan.train.loop import run_loop
    from layerplan.train.micro_batch import build_to_fit, make_trial_rows
    from layerplan.train.request import TrainRequest
    from layerplan.train.state import TrainState

    logging.basicConfig(level=logging.INFO)
    folder, fate = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / fate}", rank=0, world_size=1)
    shape = ModelShape.from_hf_config(SIZES)
    base = str(folder / "base")
    plan = make_plan(ExplicitPlanConfig(trainable=["0:"]), model=identify_model(base), shape=shape)
    config = TrainConfig(max_steps=2, global_batch_size=4, micro_batch_size="auto", compute_dtype="float32")
    request = TrainRequest(folder, ModelRef(base), plan, folder / "store", config, seed=0, recipe=LossRecipe())
    place = {"seq_len": SEQ_LEN, "rank": 0, "world_size": 1}

    def build(**most: int | None) -> BuiltModel:
        made = build_model(request, plan, shape, torch.device("cpu"), local_world_size=1, **place, **most)  # type: ignore[arg-type]
        if fate == "killed":
            made.placed.model.causal_lm.model.layers[0].register_forward_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            )
            return made
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, resource.RLIM_INFINITY))
        return made

    built = build_to_fit(build, request, forget=partial(resource.setrlimit, resource.RLIMIT_AS, (-1, -1)), **place)  # type: ignore[arg-type]
    rows = make_trial_rows(built, SEQ_LEN)
    hooks = LoopHooks(lambda start, stop: iter([rows] * (stop - start)), lambda state: None, lambda: False, None, None)
    setup = LoopSetup(built.placed, built.optimizer, built.applied, built.config, built.device, 0, 1)
    print(f"{built.config.micro_rows} rows per forward pass, {run_loop(setup, TrainState(), hooks).step} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
