"""Optimizers over what the plan trains: float32 masters, clipping folded into the one pass over the state.

A bfloat16 weight cannot hold an update smaller than 1/256 of itself, and at a learning rate of 1e-5 most are. Where
weights are bfloat16, the optimizer therefore owns a float32 master and the weight is only its rounded copy. Where
weights are float32 already (float32 compute, or FSDP shards), the weight is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerplan.config.train import OptimizerConfig
from layerplan.errors import TrainingError


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, float32 state and masters, one pass over each tensor.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`, and `master` when the parameter is not float32.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        masters: Mapping[int, Tensor],
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": config.learning_rate, "weight_decay": config.weight_decay})
        self._config = config
        self._compiled = compiled
        for parameter in iter_parameters(self):
            self._init_state(parameter, masters)

    def _init_state(self, parameter: Tensor, masters: Mapping[int, Tensor]) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        if parameter.dtype != torch.float32:
            state["master"] = masters[id(parameter)].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None) -> None:
        """Applies one update.

        Args:
            closure: Not supported; here because the base class has it.
            grad_scale: Scalar every gradient is multiplied by, such as the clipping coefficient.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, grad_scale)

    def _update(self, parameter: Tensor, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        state = self.state[parameter]
        state["step"] += 1
        master = state.get("master", parameter)
        local = [local_tensor(t) for t in (master, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        beta1, beta2 = self._config.betas
        if self._compiled:
            scale = torch.ones((), device=local[0].device) if grad_scale is None else grad_scale
            step = float(state["step"])
            values = torch.tensor(
                [group["lr"], group["weight_decay"], 1 - beta1**step, 1 - beta2**step], device=local[0].device
            )
            flat = [tensor.view(-1) for tensor in local]
            if "master" in state:
                flat.insert(0, local_tensor(parameter).view(-1))
            _compiled_adamw("master" in state)(*flat, scale, values, beta1, beta2, self._config.eps)
            return
        master, grad, exp_avg, exp_avg_sq = local
        _fused_adamw(master, grad, exp_avg, exp_avg_sq, state["step"], group, self._config, grad_scale)
        if "master" in state:
            local_tensor(parameter).copy_(local[0])


class MasterOptimizer(torch.optim.Optimizer):
    """Float32 masters around any optimizer of a library; used for the memory-lean one."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masters: Mapping[int, Tensor],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        super().__init__(groups, {})
        for parameter in iter_parameters(self):
            if parameter.dtype != torch.float32:
                self.state[parameter] = {"master": nn.Parameter(masters[id(parameter)].to(parameter.device))}
        self._inner = make(
            [{**group, "params": [self._master(p) for p in group["params"]]} for group in self.param_groups]
        )
        self._make_state_exist()

    def _master(self, parameter: Tensor) -> Tensor:
        master: Tensor = self.state[parameter].get("master", parameter)
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None) -> None:
        """Applies one update of the inner optimizer and copies masters back; `grad_scale` as in `MasterAdamW`."""
        for group, inner in zip(self.param_groups, self._inner.param_groups):
            inner["lr"] = group["lr"]
        for parameter in iter_parameters(self):
            master = self._master(parameter)
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if grad_scale is None else parameter.grad.float() * grad_scale
        self._inner.step()
        for parameter in iter_parameters(self):
            master = self._master(parameter)
            self.state[parameter].update(self._inner.state.get(master, {}))
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)

    def _make_state_exist(self) -> None:
        """A library makes its state in its first step; a checkpoint is read into state that exists, all zero."""
        for parameter in iter_parameters(self):
            master = self._master(parameter)
            before = master.detach().clone()
            master.grad = torch.zeros_like(master)
            self._inner.step()
            master.grad = None
            with torch.no_grad():
                master.copy_(before)
                for value in self._inner.state[master].values():
                    value.zero_()
            self.state[parameter].update(self._inner.state[master])


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    masters: Mapping[int, Tensor] | None = None,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """Builds the optimizer over the parameters that require gradients; build it after sharding.

    Matrices decay, vectors do not.

    Args:
        model: Placed, so that its parameters are the final ones.
        config: Optimizer section.
        masters: id of a parameter that is not float32 to its float32 original.
        compiled: Fuse the AdamW pass with torch.compile.

    Raises:
        TrainingError: When nothing trains, or the memory-lean optimizer meets sharded parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError("the plan trains no parameter of this model")
    decays = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.type == "adamw":
        return MasterAdamW(groups, config, masters or {}, compiled=compiled)
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise TrainingError(
            "train.optimizer.type=adafactor: its row and column statistics need whole matrices;"
            " use train.parallelism=replicate or train.optimizer.type=adamw"
        )
    return MasterOptimizer(
        groups, masters or {}, lambda parameters: torch.optim.Adafactor(parameters, lr=config.learning_rate)
    )


def iter_parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """Parameters of all groups, in order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def compute_grad_norm(
    parameters: Iterable[Tensor], reduce_square: Callable[[Tensor], Tensor] | None = None, *, compiled: bool = False
) -> Tensor:
    """Global L2 norm of the gradients, float32, the same on every rank.

    Args:
        parameters: Those with a gradient count.
        reduce_square: Sums a squared norm over the ranks that hold different shards; None when gradients are whole.
        compiled: Read bfloat16 gradients once instead of converting them to a float32 copy first.
    """
    square_sum = _compiled_square_sum() if compiled else _square_sum
    squares = [square_sum(local_tensor(value.grad).reshape(-1)) for value in parameters if value.grad is not None]
    square = torch.stack(squares).sum()
    return (square if reduce_square is None else reduce_square(square)).sqrt()


def _square_sum(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat, dtype=torch.float32).square()


def _float32_square_sum(flat: Tensor) -> Tensor:
    return flat.float().square().sum()


@lru_cache(maxsize=1)
def _compiled_square_sum() -> Callable[[Tensor], Tensor]:
    return torch.compile(_float32_square_sum, dynamic=True)


def compute_clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by so that their norm is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fused_adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    group: dict[str, Any],
    config: OptimizerConfig,
    grad_scale: Tensor | None,
) -> None:
    """PyTorch's own one-pass kernel; it divides by its scale, hence the reciprocal."""
    torch._fused_adamw_(
        [master],
        [grad if grad.dtype == torch.float32 else grad.float()],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.to(master.device)],
        lr=group["lr"],
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=group["weight_decay"],
        eps=config.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if grad_scale is None else grad_scale.reciprocal().to(master.device),
        found_inf=None,
    )


@lru_cache(maxsize=2)
def _compiled_adamw(has_master: bool) -> Callable[..., None]:
    """Separate graphs, because a weight that is its own master must not be written twice."""
    return torch.compile(_adamw_with_master if has_master else _adamw_alone, dynamic=True)


def _adamw_with_master(weight: Tensor, master: Tensor, *rest: Any) -> None:
    """As `_adamw_pass`, and the rounded copy into the weight."""
    weight.copy_(_adamw_pass(master, *rest))


def _adamw_alone(weight: Tensor, *rest: Any) -> None:
    """As `_adamw_pass`, for a float32 weight that is its own master."""
    _adamw_pass(weight, *rest)


def _adamw_pass(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor,
    values: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Everything AdamW does to one flat tensor; compiled, it reads and writes each byte once.

    `values` holds learning rate, weight decay and the two bias corrections, so that a new step is not a new graph.
    """
    lr, decay, correction1, correction2 = values.unbind()
    g = grad.float() * scale
    m = exp_avg + (g - exp_avg) * (1 - beta1)
    v = exp_avg_sq * beta2 + g * g * (1 - beta2)
    updated = master * (1 - lr * decay) - (lr / correction1) * m / ((v / correction2).sqrt() + eps)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    master.copy_(updated)
    return updated
