"""Optimizers over what the plan trains: float32 masters, clipping folded into the one pass over the state.

A bfloat16 weight cannot hold an update smaller than 1/256 of itself, and at a learning rate of 1e-5 most are. Where
weights are bfloat16, the optimizer therefore owns a float32 master and the weight is only its rounded copy. Where
weights are float32 already (float32 compute, or FSDP shards), the weight is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerplan.config.train import OptimizerConfig
from layerplan.errors import TrainingError
from layerplan.train.adamw import State, UpdateTerms, choose_adamw, local_tensor

STATE_VECTORS = ("A_log", "D")
"""Names that state-space models give the decay of their state and what passes by it: a number per channel, or per channel
and state."""
NORM_ELEMENTS = 2**16
"""Whose squares PyTorch may sum at a time."""


class UpdateRule(Protocol):
    """How parameters change by their gradients."""

    def make_state(self, master: Tensor) -> State:
        """What the rule remembers of a parameter, all zero, so that a checkpoint can be read into it."""

    def update(self, weights: list[Tensor], states: list[State], terms: UpdateTerms) -> None:
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
            terms = UpdateTerms(group["lr"], group["weight_decay"], grad_scale, found_inf)
            self._rule.update(weights, [self.state[weight] for weight in weights], terms)


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

    def update(self, weights: list[Tensor], states: list[State], terms: UpdateTerms) -> None:
        """One step of each weight's optimizer; the library has no `found_inf`, so this waits for the device."""
        if terms.found_inf is not None and bool(terms.found_inf):
            return
        for weight, state in zip(weights, states, strict=True):
            self._update_one(weight, state, terms)

    def _update_one(self, weight: Tensor, state: State, terms: UpdateTerms) -> None:
        master, grad = state.get("master", weight), weight.grad
        assert grad is not None
        inner = self._inner[id(master)]
        inner.param_groups[0].update(lr=terms.lr, weight_decay=terms.weight_decay)
        master.grad = grad.float() if terms.grad_scale is None else grad.float() * terms.grad_scale
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

    Matrices decay, vectors do not (`is_matrix`).

    Args:
        model: Placed, so that its parameters are the final ones.
        config: Optimizer section.
        masters: id of a parameter that is not float32 to its float32 original.
        compiled: Fuse the AdamW pass: with torch.compile, on a GPU by one kernel for all weights.

    Raises:
        TrainingError: When nothing trains, or the memory-lean optimizer meets sharded parameters.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for _, parameter in named]
    if not trained:
        raise TrainingError("the plan trains no parameter of this model")
    decays = [parameter for name, parameter in named if is_matrix(name, parameter)]
    others = [parameter for name, parameter in named if not is_matrix(name, parameter)]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.type == "adamw":
        return MasterOptimizer(groups, config, masters or {}, choose_adamw(compiled, trained[0].device)(config))
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise TrainingError(
            "train.optimizer.type=adafactor: its row and column statistics need whole matrices;"
            " use train.parallelism=replicate or train.optimizer.type=adamw"
        )
    return MasterOptimizer(groups, config, masters or {}, Adafactor(config))


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether something is multiplied by it: not what scales (norms of several heads, one number a channel), nor biases of
    several experts, nor a state's decay, kept as one.
    """
    module, _, last = name.rpartition(".")
    is_norm = "norm" in module.rpartition(".")[2].lower()
    has_sides = sum(size > 1 for size in parameter.shape) >= 2
    return has_sides and not is_norm and "bias" not in last and last not in STATE_VECTORS


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
    """Of the norms of pieces: over 100 million elements PyTorch's norm is off by 2 % on a CPU."""
    return torch.stack([_square_norm(piece) for piece in flat.split(NORM_ELEMENTS)]).sum()


def _square_norm(flat: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat, dtype=torch.float32).square()


def _float32_square_sum(flat: Tensor) -> Tensor:
    return flat.float().square().sum()


@lru_cache(maxsize=1)
def _compiled_square_sum() -> Callable[[Tensor], Tensor]:
    return torch.compile(_float32_square_sum, dynamic=True)


def compute_clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by so that their norm is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
