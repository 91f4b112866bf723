"""Loss, optimizers and the loop: exact, and never waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.adamw import CompiledAdamW, FusedAdamW, KernelAdamW
from layerplan.train.attention import IMPLEMENTATIONS
from layerplan.train.loop import run_loop
from layerplan.train.loss import IGNORED, LossOptions, compute_loss_sum
from layerplan.train.optim import MasterOptimizer, compute_grad_norm
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import make_loop, make_rows

VALUES = TINY_QWEN3 | {"tie_word_embeddings": False, "hidden_size": 64, "head_dim": 32}


def skip_slow_compilation(device: torch.device, compiled: bool) -> None:
    if compiled and device.type == "cpu":
        pytest.skip("C++ takes a minute to compile; test_train_compiled.py holds what it computes")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_chunked_loss_is_cross_entropy_of_all_logits(device: torch.device, compiled: bool) -> None:
    """bfloat16 operands: values and gradients against float32 logits of the same numbers."""
    skip_slow_compilation(device, compiled)
    torch.manual_seed(0)
    hidden = torch.randn(3000, 128, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(1000, 128, device=device) * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(0, 1000, (3000,), device=device)
    labels[::7] = IGNORED
    expected = cross_entropy(hidden.float() @ weight.float().T, labels, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(expected / 2571, (hidden, weight))
    found = compute_loss_sum(hidden, weight, labels, scale=1 / 2571, options=LossOptions(compiled=compiled))
    grads = torch.autograd.grad(found / 2571, (hidden, weight))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    for ours, theirs in zip(grads, wanted):
        assert (ours.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()


@pytest.mark.parametrize(("softcap", "z_weight"), [(None, 0.0), (None, 0.01), (30.0, 0.01)])
@pytest.mark.parametrize("trains_head", [True, False])
def test_chunks_of_logits_become_their_gradients(
    device: torch.device, softcap: float | None, z_weight: float, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several chunks, with a vocabulary that is no multiple of anything, against float64."""
    monkeypatch.setattr("layerplan.train.loss.choose_chunk_rows", lambda *args, **kwargs: 256)
    torch.manual_seed(0)
    hidden = torch.randn(700, 64, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(40_001, 64, device=device) * 0.3).bfloat16().requires_grad_(trains_head)
    labels = torch.randint(0, 40_001, (700,), device=device)
    labels[::9] = IGNORED
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = cross_entropy(capped, labels, ignore_index=IGNORED, reduction="sum")
    expected = expected + z_weight * (capped.logsumexp(-1).square() * (labels != IGNORED)).sum()
    trained = [0, 1] if trains_head else [0]
    wanted = torch.autograd.grad(expected / 100, [exact[index] for index in trained])
    found = compute_loss_sum(hidden, weight, labels, scale=1 / 100, options=LossOptions(softcap, z_weight))
    grads = torch.autograd.grad(found / 100, [(hidden, weight)[index] for index in trained])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    for ours, theirs in zip(grads, wanted):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("rule", [FusedAdamW, CompiledAdamW, KernelAdamW])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "bfloat16 float32"])
def test_five_updates_are_adamw_in_float64_and_a_bad_one_changes_nothing(
    device: torch.device, rule: type[FusedAdamW], dtypes: str
) -> None:
    """Dtypes of weights and gradients; micro-batches of bfloat16 weights add up in float32."""
    if rule is KernelAdamW and device.type == "cpu":
        pytest.skip("the kernel is for GPUs")
    dtype, grad_dtype = (getattr(torch, name) for name in dtypes.split())
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    torch.manual_seed(0)
    shapes = [(64, 48), (48,), (7, 3), (50, 100)]
    weights = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    masters = {id(weight): weight.detach().float().clone() for weight in weights}
    groups = [{"params": weights, "lr": 1e-2, "weight_decay": 0.1}]
    ours = MasterOptimizer(groups, config, {} if dtype == torch.float32 else masters, rule(config))
    exact = [torch.nn.Parameter(weight.detach().double().clone()) for weight in weights]
    theirs = torch.optim.AdamW(exact, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.1)
    for step in range(6):
        is_bad = step == 3
        for weight, reference in zip(weights, exact):
            weight.grad_dtype = grad_dtype
            weight.grad = torch.randn(weight.shape, device=device).to(grad_dtype)
            reference.grad = weight.grad.double() * 0.5
        if is_bad:
            weights[0].grad[0, 0] = torch.inf
        else:
            theirs.step()
        ours.step(
            grad_scale=torch.full((), torch.nan if is_bad else 0.5, device=device),
            found_inf=torch.full((), float(is_bad), device=device),
        )
    for weight, reference in zip(weights, exact):
        master = ours.state[weight].get("master", weight)
        assert (master.double() - reference).norm() <= 1e-5 * reference.norm()
        assert torch.equal(weight, master.to(dtype))
        assert float(ours.state[weight]["step"]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_gradients_in_float64(device: torch.device, dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for shape in ((300, 70), (5,), (1,))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    expected = torch.cat([weight.grad.double().flatten() for weight in weights]).norm()
    assert float(compute_grad_norm(weights)) == pytest.approx(float(expected), rel=1e-5)


@contextmanager
def counting_waits(device: torch.device) -> Iterator[list[str]]:
    """On a GPU a wait is an error; on a CPU the operators that would be one are counted."""
    found: list[str] = []
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield found
    reads = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero")
    inside = ("aten::_fused", "aten::_foreach")  # kernels for CPUs take their scalars themselves
    training = {event.thread for event in profiler.events() if event.name == "aten::mm"}
    for event in profiler.events():
        parents = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            parents, parent = [*parents, parent.name], parent.cpu_parent
        if event.name in reads and event.thread in training and not any(name.startswith(inside) for name in parents):
            found.append(" in ".join(parents))


def make_config(device: torch.device, **values: object) -> TrainConfig:
    defaults: dict[str, object] = {
        "max_steps": 12,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "compute_dtype": "float32" if device.type == "cpu" else "bfloat16",
        "log_every_steps": 100,
        "checkpoint_every_steps": 100,
        "validate_every_steps": 100,
        "optimizer": OptimizerConfig(learning_rate=1e-2, eps=1e-5),
    }
    return TrainConfig.model_validate(defaults | values)


def train(
    device: torch.device, config: TrainConfig, watched: range = range(0), attention: str | None = None
) -> tuple[dict, list[str]]:  # type: ignore[type-arg]
    model = build_tiny_qwen3(**VALUES)
    model.set_attn_implementation(IMPLEMENTATIONS[attention or ("varlen" if device.type == "cuda" else "segmented")])
    plan = make_plan(
        ExplicitPlanConfig(trainable=[0, 2]),
        model=ModelIdentity(name="tiny", model_type="qwen3", num_layers=3),
        shape=ModelShape.from_hf_config(VALUES),
    )
    placement = Placement("replicate", "replicate", checkpointed_layers=frozenset({2}))
    waits: list[str] = []
    context = counting_waits(device)

    def mark(part: str, step: int) -> None:
        if step == watched.start and part == "forward and backward":
            waits.append(context.__enter__())  # type: ignore[arg-type]
        if step == watched.stop and part == "logging":
            context.__exit__(None, None, None)

    setup, hooks = make_loop(
        model,
        plan,
        config,
        rows_of_step=lambda step: make_rows(step, batch=4, vocab_size=40, start=5),
        placement=placement,
        device=device,
    )
    try:
        run_loop(setup, TrainState(), replace(hooks, mark=mark))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {name: value.detach().cpu() for name, value in model.named_parameters()}, waits[0] if waits else []  # type: ignore[return-value]


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_that_report_nothing_never_wait_for_the_device(device: torch.device, compiled: bool) -> None:
    """Steps 4 to 9 of 12, micro-batches, recomputed layers and all: not one read of a value on the device."""
    skip_slow_compilation(device, compiled)
    for attention in ("varlen", "flex") if device.type == "cuda" else ("segmented",):
        _, waits = train(device, make_config(device, compile=compiled), watched=range(4, 9), attention=attention)
        assert waits == []


def test_when_a_loss_is_read_changes_no_weight(device: torch.device) -> None:
    often, _ = train(device, make_config(device, log_every_steps=1))
    seldom, _ = train(device, make_config(device))
    assert all(torch.equal(value, seldom[name]) for name, value in often.items())
