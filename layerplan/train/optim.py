"""Optimizers over what the plan trains: float32 masters, clipping folded into the one pass over the state.

A bfloat16 weight cannot hold an update smaller than 1/256 of itself, and at a learning rate of 1e-5 most are. Where
weights are bfloat16, the optimizer therefore owns a float32 master and the weight is only its rounded copy. Where
weights are float32 already (float32 compute, or FSDP shards), the weight is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from layerplan.config.train import OptimizerConfig
from layerplan.errors import TrainingError

BATCH_BYTES = 64 << 20
"""Float32 copies of gradients that exist at a time; more of them at once save nothing but calls."""

Item = TypeVar("Item")
State = dict[str, Any]
"""What is kept of one parameter: what the rule remembers, and `master` when the parameter is not float32."""


class UpdateRule(Protocol):
    """How parameters change by their gradients."""

    def make_state(self, master: Tensor) -> State:
        """What the rule remembers of a parameter, all zero, so that a checkpoint can be read into it."""

    def update(
        self,
        weights: list[Tensor],
        states: list[State],
        group: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Changes the masters of weights that have gradients, and weights that are no masters of their own."""


class MasterOptimizer(torch.optim.Optimizer):
    """Float32 masters around an update rule."""

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, masters: Mapping[int, Tensor], rule: UpdateRule
    ) -> None:
        super().__init__(groups, {"lr": config.learning_rate, "weight_decay": config.weight_decay})
        self._rule = rule
        for parameter in iter_parameters(self):
            is_own = parameter.dtype == torch.float32
            master = parameter if is_own else masters[id(parameter)].to(parameter.device)
            self.state[parameter] = rule.make_state(master) | ({} if is_own else {"master": master})

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Applies one update.

        Args:
            closure: Not supported; here because the base class has it.
            grad_scale: Scalar every gradient is multiplied by, such as the clipping coefficient.
            found_inf: Float32 scalar on the device; where it is 1, weights, moments and steps stay as they are.
        """
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._rule.update(weights, [self.state[weight] for weight in weights], group, grad_scale, found_inf)


class FusedAdamW:
    """AdamW with decoupled weight decay by PyTorch's own kernel: one pass over the state, clipping included."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config

    def make_state(self, master: Tensor) -> State:
        """Steps and both moments, where the master lies."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }

    def update(
        self,
        weights: list[Tensor],
        states: list[State],
        group: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step of as many weights at a time as have small enough float32 gradients."""
        pairs = list(zip(weights, states, strict=True))
        for batch in iter_batches(pairs, lambda pair: _count_copied_bytes(pair[0])):
            self._update_batch(batch, group, grad_scale, found_inf)

    def _update_batch(
        self, batch: list[tuple[Tensor, State]], group: State, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        masters = [local_tensor(state.get("master", weight)) for weight, state in batch]
        adamw(
            masters,
            [local_tensor(weight.grad).float() for weight, _ in batch],
            [local_tensor(state["exp_avg"]) for _, state in batch],
            [local_tensor(state["exp_avg_sq"]) for _, state in batch],
            [],
            [state["step"] for _, state in batch],
            fused=True,
            grad_scale=None if grad_scale is None else grad_scale.reciprocal(),  # the kernel divides by it
            found_inf=found_inf,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )
        copies = [
            (local_tensor(weight), master)
            for (weight, state), master in zip(batch, masters, strict=True)
            if "master" in state
        ]
        if copies:
            torch._foreach_copy_(*(list(each) for each in zip(*copies)))


class CompiledAdamW(FusedAdamW):
    """The same in one compiled pass, which also converts the gradient and writes the rounded weight; other roundings."""

    def update(
        self,
        weights: list[Tensor],
        states: list[State],
        group: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step, a weight at a time."""
        if not weights:
            return
        steps = [state["step"] for state in states]
        device = steps[0].device
        kept = torch.ones((), device=device) if found_inf is None else 1 - found_inf
        torch._foreach_add_(steps, [kept] * len(steps))  # a scalar tensor would be read by the host
        scale = torch.ones((), device=device) if grad_scale is None else grad_scale
        values = self._list_values(torch.stack(steps).double(), group)
        self._update_all(weights, states, values, scale, kept)

    def _update_all(
        self, weights: list[Tensor], states: list[State], values: Tensor, scale: Tensor, kept: Tensor
    ) -> None:
        for weight, state, row in zip(weights, states, values.unbind(), strict=True):
            self._update_one(weight, state, row, scale, kept)

    def _list_values(self, steps: Tensor, group: State) -> Tensor:
        """Learning rate, weight decay and both bias corrections of every weight, float32, made on the device."""
        corrections = [1 - torch.pow(beta, steps) for beta in self._config.betas]
        settings = [torch.full_like(steps, group[name]) for name in ("lr", "weight_decay")]
        return torch.stack([*settings, *corrections], dim=1).float()

    def _update_one(self, weight: Tensor, state: State, values: Tensor, scale: Tensor, kept: Tensor) -> None:
        has_master = "master" in state
        tensors = [state.get("master", weight), weight.grad, state["exp_avg"], state["exp_avg_sq"]]
        # detached, since the compiler would look at the gradient of what a view is a view of
        flat = [local_tensor(each).detach().view(-1) for each in ([weight] if has_master else []) + tensors]
        beta1, beta2 = self._config.betas
        _compiled_adamw(has_master)(*flat, scale, values, kept, beta1, beta2, self._config.eps)


class KernelAdamW(CompiledAdamW):
    """The same on a GPU in one launch for all weights of a dtype; what is oddly placed goes one at a time."""

    def __init__(self, config: OptimizerConfig) -> None:
        super().__init__(config)
        self._blocks: dict[tuple[int, ...], Any] = {}

    def update(
        self,
        weights: list[Tensor],
        states: list[State],
        group: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step, a dtype at a time."""
        for same in _group_by_dtypes(weights):
            chosen = [weights[index] for index in same], [states[index] for index in same]
            super().update(*chosen, group, grad_scale, found_inf)

    def _update_all(
        self, weights: list[Tensor], states: list[State], values: Tensor, scale: Tensor, kept: Tensor
    ) -> None:
        from layerplan.train.adamw_kernel import TensorBlocks, is_readable, update_weights

        rows = list(zip(*map(_list_tensors, weights, states)))
        if not is_readable(rows):
            super()._update_all(weights, states, values, scale, kept)
            return
        sizes = tuple(tensor.numel() for tensor in rows[0])
        if sizes not in self._blocks:
            self._blocks[sizes] = TensorBlocks(sizes, scale.device)
        update_weights(rows, self._blocks[sizes], values, scale, kept, betas=self._config.betas, eps=self._config.eps)


def _list_tensors(weight: Tensor, state: State) -> tuple[Tensor, ...]:
    """This rank's part of a weight, its gradient, its master and its moments."""
    own = local_tensor(weight)
    master = local_tensor(state["master"]) if "master" in state else own
    return own, local_tensor(weight.grad), master, local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])


def _group_by_dtypes(weights: list[Tensor]) -> list[list[int]]:
    """Indices of weights whose own dtype and their gradient's are the same."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for index, weight in enumerate(weights):
        assert weight.grad is not None
        groups.setdefault((weight.dtype, weight.grad.dtype), []).append(index)
    return list(groups.values())


class Adafactor:
    """The memory-lean rule of PyTorch's own optimizer, one of it per parameter."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._inner: dict[int, torch.optim.Optimizer] = {}

    def make_state(self, master: Tensor) -> State:
        """What the library makes in its first step, after one that is taken back."""
        inner = self._inner[id(master)] = torch.optim.Adafactor([master], lr=self._config.learning_rate)
        before = master.detach().clone()
        master.grad = torch.zeros_like(master)
        inner.step()
        master.grad = None
        with torch.no_grad():
            master.copy_(before)
            for value in inner.state[master].values():
                value.zero_()
        return inner.state[master]

    def update(
        self,
        weights: list[Tensor],
        states: list[State],
        group: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step of each weight's optimizer; the library has no `found_inf`, so this waits for the device."""
        if found_inf is not None and bool(found_inf):
            return
        for weight, state in zip(weights, states, strict=True):
            self._update_one(weight, state, group, grad_scale)

    def _update_one(self, weight: Tensor, state: State, group: State, grad_scale: Tensor | None) -> None:
        master, grad = state.get("master", weight), weight.grad
        assert grad is not None
        inner = self._inner[id(master)]
        inner.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
        master.grad = grad.float() if grad_scale is None else grad.float() * grad_scale
        inner.step()
        if master is not weight:
            master.grad = None
            weight.copy_(master)


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
        compiled: Fuse the AdamW pass: with torch.compile, on a GPU by one kernel for all weights.

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
        return MasterOptimizer(groups, config, masters or {}, _choose_adamw(compiled, trained[0].device)(config))
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise TrainingError(
            "train.optimizer.type=adafactor: its row and column statistics need whole matrices;"
            " use train.parallelism=replicate or train.optimizer.type=adamw"
        )
    return MasterOptimizer(groups, config, masters or {}, Adafactor(config))


def _choose_adamw(compiled: bool, device: torch.device) -> type[FusedAdamW]:
    if not compiled:
        return FusedAdamW
    return KernelAdamW if device.type == "cuda" and find_spec("triton") else CompiledAdamW


def iter_parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """Parameters of all groups, in order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def iter_batches(items: Iterable[Item], count_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items that come to `BATCH_BYTES` together, or one that is larger."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + count_bytes(item) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += count_bytes(item)
    if batch:
        yield batch


def _count_copied_bytes(weight: Tensor) -> int:
    """Of the float32 copy of its gradient; none of a gradient that is float32 already."""
    assert weight.grad is not None
    return 0 if weight.grad.dtype == torch.float32 else 4 * local_tensor(weight).numel()


def compute_grad_norm(
    parameters: Iterable[Tensor], reduce_square: Callable[[Tensor], Tensor] | None = None, *, compiled: bool = False
) -> Tensor:
    """Global L2 norm of the gradients, float32, the same on every rank.

    Args:
        parameters: Those with a gradient count.
        reduce_square: Sums a squared norm over the ranks that hold different shards; None when gradients are whole.
        compiled: Read bfloat16 gradients once instead of converting them to a float32 copy first.
    """
    gradients = [local_tensor(value.grad) for value in parameters if value.grad is not None]
    if gradients and gradients[0].device.type == "cuda":
        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        square = torch.stack(list(norms)).square().sum()
        return (square if reduce_square is None else reduce_square(square)).sqrt()
    square_sum = _compiled_square_sum() if compiled else _square_sum
    squares = [square_sum(gradient.reshape(-1)) for gradient in gradients]
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
    kept: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Everything AdamW does to one flat tensor; compiled, it reads and writes each byte once.

    `values` holds learning rate, weight decay and the two bias corrections, so that a new step is not a new graph;
    `kept` is 0 where nothing may change.
    """
    lr, decay, correction1, correction2 = values.unbind()
    is_kept = kept > 0
    g = grad.float() * scale
    m = exp_avg + (g - exp_avg) * (1 - beta1)
    v = exp_avg_sq * beta2 + g * g * (1 - beta2)
    updated = master * (1 - lr * decay) - (lr / correction1) * m / ((v / correction2).sqrt() + eps)
    m, v, updated = (torch.where(is_kept, new, old) for new, old in ((m, exp_avg), (v, exp_avg_sq), (updated, master)))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    master.copy_(updated)
    return updated
