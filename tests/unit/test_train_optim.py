"""The optimizers against PyTorch's own, bit by bit: float32 weights, and float32 masters of bfloat16 ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerplan.config.train import OptimizerConfig
from layerplan.train import adamw
from layerplan.train.optim import build_optimizer
from tests import families

STEPS = 5
SCALE = 0.5
"""A power of two, by which a gradient is multiplied without rounding."""


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)


def make_gradients(model: nn.Module) -> list[list[Tensor]]:
    torch.manual_seed(2)
    return [[torch.randn_like(each) for each in model.parameters()] for _ in range(STEPS)]


def make_oracle(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's own optimizer over a copy in float32: matrices decay, vectors do not."""
    groups = [
        {"params": [each for each in model.parameters() if each.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
    ]
    if config.type == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_weights_are_pytorchs_own_to_the_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BATCH_BYTES", 100)  # some matrices are larger, some vectors go together
    config = OptimizerConfig(type=kind, learning_rate=1e-3, weight_decay=0.1)  # type: ignore[arg-type]
    model, exact = make_model(dtype), make_model(dtype).float()
    masters = {id(each): each.detach().float().clone() for each in model.parameters() if dtype != torch.float32}
    ours, oracle = build_optimizer(model, config, masters=masters), make_oracle(exact, config)
    for step, gradients in enumerate(make_gradients(model)):
        for optimizer in (ours, oracle):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
        for mine, theirs, gradient in zip(model.parameters(), exact.parameters(), gradients):
            mine.grad, theirs.grad = gradient.clone(), gradient.float() * SCALE
        ours.step(grad_scale=torch.tensor(SCALE))
        oracle.step()
        for mine, theirs in zip(model.parameters(), exact.parameters()):
            assert torch.equal(ours.state[mine].get("master", mine), theirs)
            assert torch.equal(mine, theirs.to(dtype))
            for name, value in oracle.state[theirs].items():
                assert torch.equal(ours.state[mine][name], value), name


def test_a_parameter_without_a_gradient_keeps_its_weight_and_its_state() -> None:
    model = make_model(torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-3))
    before = [each.detach().clone() for each in model.parameters()]
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, model.parameters())] == [False, True, True, True, True]
    assert [float(optimizer.state[each]["step"]) for each in model.parameters()] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("family", ["gpt_oss", "mamba"])
def test_biases_of_experts_and_vectors_of_a_state_do_not_decay(family: str) -> None:
    """A step whose gradients are zero moves what decays alone."""
    model = families.make_model(family).float()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    vectors = {name for name in before if "bias" in name or name.endswith(("A_log", ".D", "norm.weight"))}
    assert any(before[name].ndim > 1 and before[name].any() for name in vectors), "the kind that was taken for matrices"
    assert not moved & vectors
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear & before.keys() <= moved
