"""Two gloo workers equal one process over 50 steps: every plan type, tied and untied, replicated and sharded.

What a worker holds of a plan in bfloat16 is counted too, byte by byte, and what it gathers in its backward pass.
The test starts this file twice as a program; each copy is one worker and checks itself against the single process.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.ray_script import run_two_workers

NUM_STEPS = 50
TIES = {"full": (False, True), "freeze_deep": (False, True), "freeze_shallow": (False, True), "explicit": (False, True)}
TIES["modules"] = (False,)
"""Plans, and whether embeddings are tied; modules inside layers know nothing of them."""
PLACEMENTS = (("replicate", "replicate", 1), ("shard", "replicate", 1), ("shard", "shard", 1), ("shard", "shard", 2))
"""Parallelism, frozen layers, and groups that each hold all shards (HSDP)."""
IN_PIECES = PLACEMENTS[2]
"""Takes a step in two micro-batches, after each of which gradients are sent."""


def test_two_workers_equal_one_process_over_fifty_steps(tmp_path: Path) -> None:
    """36 cases: four plans of whole layers, tied and untied, one of modules, four placements; parameters within 1e-5."""
    outputs = run_two_workers(__file__)
    assert outputs[0].count("case ok") == sum(map(len, TIES.values())) * len(PLACEMENTS)
    for output in outputs:
        assert output.count("bytes ok") == len(TIES) * len(PLACEMENTS)
        assert output.count("validation ok") == 1


def make_model(is_tied: bool):  # type: ignore[no-untyped-def]
    from tests.qwen3 import build_tiny_qwen3

    return build_tiny_qwen3(vocab_size=96, tie_word_embeddings=is_tied).train()


def make_plan_for(model, plan_type: str):  # type: ignore[no-untyped-def]
    from pydantic import TypeAdapter

    from layerplan.config.plan import PlanConfig
    from layerplan.plan.layer_profile import ModelIdentity
    from layerplan.plan.model_shape import ModelShape
    from layerplan.plan.policies import make_plan

    ends = {"train_embeddings": False}
    values = {
        "full": {"type": "full"},
        "freeze_deep": {"type": "freeze_deep", "boundary": 2, **ends},
        "freeze_shallow": {"type": "freeze_shallow", "boundary": 2, "train_final_norm": True, "train_lm_head": True},
        "explicit": {"type": "explicit", "trainable": [0, 2], **ends},
        "modules": {"type": "freeze_shallow", "boundary": 1, "modules": ["mlp.down_proj", "*.k_*", "input_layernorm"]},
    }[plan_type]
    is_tied = model.config.tie_word_embeddings
    if plan_type == "freeze_shallow" and is_tied:
        values = {**values, "tied": "head_only"}
    identity = ModelIdentity(name="tiny", revision="main", model_type="qwen3", num_layers=3, weights_sha256=None)
    shape = ModelShape.from_hf_config(model.config.to_dict())
    return make_plan(TypeAdapter(PlanConfig).validate_python(values), model=identity, shape=shape, profile=None)


def rows_of_step(step: int, rank: int, world_size: int):  # type: ignore[no-untyped-def]
    from layerplan.corpus.rows import PackedRows

    rng = np.random.default_rng(step)
    input_ids = rng.integers(0, 96, size=(8, 16), dtype=np.int32)
    document_ids = np.repeat([[0] * 6 + [1] * 10], 8, axis=0).astype(np.int32)
    document_ids[0, 12:] = -1
    position_ids = np.repeat([[*range(6), *range(10)]], 8, axis=0).astype(np.int32)
    rows = PackedRows(np.arange(8, dtype=np.int64), input_ids, document_ids, position_ids)
    pick = slice(rank, None, world_size)
    return PackedRows(rows.row_ids[pick], input_ids[pick], document_ids[pick], position_ids[pick])


def train(plan_type, is_tied, placement, rank, world_size):  # type: ignore[no-untyped-def]
    import torch

    from layerplan.config.train import OptimizerConfig, TrainConfig
    from layerplan.models.freezing import apply_plan, hf_name
    from layerplan.plan.placement import Placement
    from layerplan.train.frozen_check import FrozenTensors
    from layerplan.train.loop import run_loop
    from layerplan.train.loop_setup import LoopHooks, LoopSetup
    from layerplan.train.optim import build_optimizer
    from layerplan.train.self_test import confirm_recipe
    from layerplan.train.sharding import place_model
    from layerplan.train.state import TrainState

    parallelism, frozen, num_replicas = placement
    model = make_model(is_tied)
    plan = make_plan_for(model, plan_type)
    config = TrainConfig(
        max_steps=NUM_STEPS,
        global_batch_size=8,
        micro_batch_size=2 if placement == IN_PIECES else 4,
        num_workers=world_size,
        num_replicas=num_replicas,
        compute_dtype="float32",
        log_every_steps=1000,
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-5),
    )
    applied = apply_plan(model, plan)
    device = torch.device("cpu")
    settled = Placement(parallelism, frozen, reduces_each=placement == IN_PIECES)
    placed = place_model(model, plan, config, settled, world_size=world_size, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)

    def iter_steps(start: int, stop: int) -> Iterator[object]:
        return (rows_of_step(step, rank, world_size) for step in range(start, stop))

    hooks = LoopHooks(iter_steps, lambda state: None, lambda: False, None, None)
    confirm_recipe(placed.model, seq_len=16, dtype=torch.float32)  # its passes without a backward leave shards gathered
    frozen_tensors = FrozenTensors(placed.model, "float32", world_size)
    setup = LoopSetup(placed, optimizer, applied, config, device, rank, world_size, frozen=frozen_tensors)
    state = run_loop(setup, TrainState(frozen_checksum=frozen_tensors.digest), hooks)
    full = {}
    for name, parameter in placed.model.named_parameters():
        full[hf_name(name)] = (
            (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()
        )
    return state, full, placed, plan, applied


@dataclass
class Sent:
    """What FSDP asked of its collectives."""

    gathered: set[str] = field(default_factory=set)
    gathered_backward: set[str] = field(default_factory=set)
    """In backward passes alone."""
    reduced_bytes: int = 0


@contextmanager
def count_collectives() -> Iterator[Sent]:
    """Listens where FSDP2 starts its gathers and reductions."""
    from unittest import mock

    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    from layerplan.models.freezing import hf_name

    sent, gather, reduce = Sent(), fsdp.foreach_all_gather, fsdp.foreach_reduce

    def count_gather(params, *args, **kwargs):  # type: ignore[no-untyped-def]
        names = {hf_name(param._param_fqn) for param in params}
        sent.gathered |= names
        if torch._C._current_graph_task_id() >= 0:
            sent.gathered_backward |= names
        return gather(params, *args, **kwargs)

    def count_reduce(params, grads, *args, **kwargs):  # type: ignore[no-untyped-def]
        sent.reduced_bytes += sum(grad.numel() * grad.element_size() for grad in grads)
        return reduce(params, grads, *args, **kwargs)

    with (
        mock.patch.object(fsdp, "foreach_all_gather", count_gather),
        mock.patch.object(fsdp, "foreach_reduce", count_reduce),
    ):
        yield sent


def list_storages() -> dict[int, int]:
    """Bytes of the memory of all tensors there are, by its address."""
    import torch

    gc.collect()
    found = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and not value.is_meta:
            value = getattr(value, "_local_tensor", value)
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return found


def count_new_bytes(before: dict[int, int]) -> int:
    """Bytes of the tensors that there are and were not before."""
    return sum(size for at, size in list_storages().items() if at not in before)


def count_bytes(plan_type: str, placement, rank: int) -> None:  # type: ignore[no-untyped-def]
    """A step in bfloat16: frozen parameters take two bytes a weight, whole or in shards, and nothing beside."""
    import torch

    from layerplan.config.train import TrainConfig
    from layerplan.models.freezing import apply_plan, hf_name
    from layerplan.plan.placement import Placement
    from layerplan.train.optim import build_optimizer
    from layerplan.train.sharding import place_model
    from layerplan.train.step import accumulate_gradients, make_batches

    parallelism, frozen_sharding, num_replicas = placement
    before = list_storages()
    model, device = make_model(is_tied=False), torch.device("cpu")
    plan = make_plan_for(model, plan_type)
    config = TrainConfig(global_batch_size=8, micro_batch_size=2, num_workers=2, num_replicas=num_replicas)
    applied = apply_plan(model, plan)
    placed = place_model(model, plan, config, Placement(parallelism, frozen_sharding), world_size=2, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)
    placed.masters.clear()
    batches = make_batches(rows_of_step(0, rank, 2), 2, placed.model.recipe, device)
    with count_collectives() as sent:
        accumulate_gradients(placed.model, batches, 1.0, placed.set_sync)
        if placed.finish_sync is not None:
            placed.finish_sync()
    named = {hf_name(name): value for name, value in placed.model.named_parameters()}
    assert all(named[name].grad is None for name in applied.frozen), f"{plan_type} {placement}: a frozen gradient"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert {id(value) for value in optimizer.state} == {id(named[name]) for name in applied.trainable}
    del batches
    shards = 2 // num_replicas
    trained, frozen = (sum(named[name].numel() for name in names) for names in (applied.trainable, applied.frozen))
    if parallelism == "replicate":
        wanted = trained * (2 + 4 + 8) + frozen * 2
    else:
        wanted = trained * (4 + 8) // shards + frozen * 2 // (shards if frozen_sharding == "shard" else 1)
    held = count_new_bytes(before)
    deadline = time.monotonic() + 20
    while held - wanted >= 2048 and time.monotonic() < deadline:
        time.sleep(0.01)  # gloo's thread lets go of a sum's tensor a moment after the sum was waited for
        held = count_new_bytes(before)
    assert 0 <= held - wanted < 2048, f"{plan_type} {placement}: {held} bytes, not {wanted}"
    lowest = min(plan.trainable_layers)
    below = {name for name in named if any(f".layers.{layer}." in name for layer in range(lowest))}
    below |= {name for name in applied.frozen if "embed_tokens" in name}
    assert not sent.gathered_backward & below, f"{plan_type} {placement}: {sent.gathered_backward & below}"
    is_gathered = parallelism == "shard" and num_replicas == 1
    assert bool(sent.gathered_backward) == is_gathered and (not is_gathered or sent.gathered >= set(applied.trainable))
    placed.release()
    print(f"bytes ok {plan_type} {placement}: {held:,} of {wanted:,}", flush=True)


def check_validation(rank: int) -> None:
    """Seven rows of which each is a micro-batch, in pairs: one rank has a row fewer, and gathers with the other all the same."""
    import torch

    from layerplan.config.train import TrainConfig
    from layerplan.models.freezing import apply_plan
    from layerplan.plan.loss_recipe import LossRecipe
    from layerplan.plan.placement import Placement
    from layerplan.train.sharding import place_model
    from layerplan.train.step import LossModel
    from layerplan.train.validation import compute_validation_loss

    device, rows = torch.device("cpu"), rows_of_step(0, 0, 1).take(0, 7)
    expected = compute_validation_loss(LossModel(make_model(False)), rows, micro_batch_size=7, device=device)
    model = make_model(False)
    plan = make_plan_for(model, "full")
    apply_plan(model, plan)
    config = TrainConfig(global_batch_size=8, micro_batch_size=2, num_workers=2, compute_dtype="float32")
    place = {"world_size": 2, "device": device, "recipe": LossRecipe(rows="reset")}
    placed = place_model(model, plan, config, Placement("shard", "shard"), **place)
    found = compute_validation_loss(placed.model, rows, micro_batch_size=2, device=device, rank=rank, world_size=2)
    assert abs(found - expected) < 1e-6, (found, expected)
    print("validation ok", flush=True)


def main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through each time that tensors are counted
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for plan_type, ties in TIES.items():
        for is_tied in ties:
            base = {name: value.clone() for name, value in make_model(is_tied).named_parameters()}
            alone, expected, _, _, applied = train(plan_type, is_tied, PLACEMENTS[0], 0, 1)
            for placement in PLACEMENTS:
                with count_collectives() as sent:
                    state, found, placed, _, _ = train(plan_type, is_tied, placement, rank, 2)
                assert found.keys() == expected.keys()
                worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
                case = f"{plan_type} tied={is_tied} {placement}"
                assert worst < 1e-5, f"{case}: {worst}"
                assert abs(state.last_loss - alone.last_loss) < 1e-5, case
                assert state.tokens_seen == alone.tokens_seen, case
                assert state.frozen_checks == 1, case
                assert state.frozen_checksum == alone.frozen_checksum, f"{case}: depends on the placement"
                for name in applied.frozen:
                    assert torch.equal(found[name], base[name]), f"{case}: frozen {name} moved"
                trained = sum(found[name].numel() * 4 for name in applied.trainable)
                if placed.reducer is not None:
                    assert placed.reducer.bytes_sent == trained, case
                    assert sent.gathered == set() and sent.reduced_bytes == 0, case
                else:
                    assert sent.reduced_bytes == NUM_STEPS * trained * (2 if placement == IN_PIECES else 1), case
                    gathered = set(applied.trainable) if placement[1] == "replicate" else set(found)
                    # a group of one worker has nothing to gather
                    assert sent.gathered == (gathered if placement[2] == 1 else set()), case
                parameter = weakref.ref(next(placed.model.parameters()))
                placed.release()
                del placed
                gc.collect()
                assert parameter() is None, f"{case}: a phase that is over keeps its parameters"
                print(f"case ok {case}: {worst:.1e}", flush=True)
    for plan_type in TIES:
        for placement in PLACEMENTS:
            count_bytes(plan_type, placement, rank)
    check_validation(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
