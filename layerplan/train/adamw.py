"""AdamW over float32 masters: by PyTorch's fused kernel, in one compiled pass a weight, or in one launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from layerplan.config.train import OptimizerConfig

BATCH_BYTES = 64 << 20
"""Float32 copies of gradients that exist at a time; more of them at once save nothing but calls."""

Item = TypeVar("Item")
State = dict[str, Any]
"""What is kept of one parameter: what the rule remembers, and `master` when the parameter is not float32."""


@dataclass(frozen=True)
class UpdateTerms:
    """What one update has beside weights and gradients."""

    lr: float
    weight_decay: float
    grad_scale: Tensor | None = None
    """Scalar every gradient is multiplied by."""
    found_inf: Tensor | None = None
    """Float32 scalar on the device; where it is 1, nothing changes."""


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

    def update(self, weights: list[Tensor], states: list[State], terms: UpdateTerms) -> None:
        """One step of as many weights at a time as have small enough float32 gradients."""
        pairs = list(zip(weights, states, strict=True))
        for batch in iter_batches(pairs, lambda pair: _count_copied_bytes(pair[0])):
            self._update_batch(batch, terms)

    def _update_batch(self, batch: list[tuple[Tensor, State]], terms: UpdateTerms) -> None:
        masters = [local_tensor(state.get("master", weight)) for weight, state in batch]
        adamw(
            masters,
            [local_tensor(weight.grad).float() for weight, _ in batch],
            [local_tensor(state["exp_avg"]) for _, state in batch],
            [local_tensor(state["exp_avg_sq"]) for _, state in batch],
            [],
            [state["step"] for _, state in batch],
            fused=True,
            grad_scale=None if terms.grad_scale is None else terms.grad_scale.reciprocal(),  # the kernel divides by it
            found_inf=terms.found_inf,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=terms.lr,
            weight_decay=terms.weight_decay,
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

    def update(self, weights: list[Tensor], states: list[State], terms: UpdateTerms) -> None:
        """One step, a weight at a time."""
        if not weights:
            return
        steps = [state["step"] for state in states]
        device = steps[0].device
        kept = torch.ones((), device=device) if terms.found_inf is None else 1 - terms.found_inf
        torch._foreach_add_(steps, [kept] * len(steps))  # a scalar tensor would be read by the host
        scale = torch.ones((), device=device) if terms.grad_scale is None else terms.grad_scale
        values = self._list_values(torch.stack(steps).double(), terms)
        self._update_all(weights, states, values, scale, kept)

    def _update_all(
        self, weights: list[Tensor], states: list[State], values: Tensor, scale: Tensor, kept: Tensor
    ) -> None:
        for weight, state, row in zip(weights, states, values.unbind(), strict=True):
            self._update_one(weight, state, row, scale, kept)

    def _list_values(self, steps: Tensor, terms: UpdateTerms) -> Tensor:
        """Learning rate, weight decay and both bias corrections of every weight, float32, made on the device."""
        corrections = [1 - torch.pow(beta, steps) for beta in self._config.betas]
        settings = [torch.full_like(steps, value) for value in (terms.lr, terms.weight_decay)]
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

    def update(self, weights: list[Tensor], states: list[State], terms: UpdateTerms) -> None:
        """One step, a dtype at a time."""
        for same in _group_by_dtypes(weights):
            chosen = [weights[index] for index in same], [states[index] for index in same]
            super().update(*chosen, terms)

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


def choose_adamw(compiled: bool, device: torch.device) -> type[FusedAdamW]:
    """The rule for a device; `compiled` fuses its passes."""
    if not compiled:
        return FusedAdamW
    return KernelAdamW if device.type == "cuda" and find_spec("triton") else CompiledAdamW


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
