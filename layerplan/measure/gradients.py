"""What the loss of a text says about each layer: norms of gradients, Fisher information, loss saved by training.

Norms and products are summed in float64. A parameter that several layers share counts in each of them. Shapes: B rows,
T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.head import make_inputs


def compute_gradient_norms(model: nn.Module, ids_BT: Tensor) -> list[float]:
    """Norm of each layer's gradient of the mean next-token loss of the rows: (L,)."""
    with asking_layers(model) as layers:
        logits_BTV = run_logits(model, ids_BT)
        mean_loss(logits_BTV, ids_BT[:, 1:]).backward()
        return [_sum_squares(layer) ** 0.5 for layer in layers]


def compute_fisher(model: nn.Module, ids_BT: Tensor, seed: int) -> list[float]:
    """Trace of each layer's Fisher information, per predicted token, on these rows: (L,).

    Labels are drawn from the model's own prediction, one for every position. The scores of different positions then have
    mean zero and are independent given the text, so that the squared norm of their sum is expected to be the sum of their
    squared norms, which is the trace. With the text's own labels it would be the squared norm of the gradient.
    """
    with asking_layers(model) as layers:
        logits_BTV = run_logits(model, ids_BT)
        labels_BT = draw_labels(logits_BTV.detach(), seed)
        num_labels = labels_BT.numel()
        (mean_loss(logits_BTV, labels_BT) * num_labels).backward()
        return [_sum_squares(layer) / num_labels for layer in layers]


def draw_labels(logits_BTV: Tensor, seed: int) -> Tensor:
    """One label for every position, drawn from the prediction: (B, T)."""
    generator = torch.Generator(device=logits_BTV.device).manual_seed(seed)
    probabilities = torch.softmax(logits_BTV.flatten(0, 1), -1)
    return torch.multinomial(probabilities, 1, generator=generator).reshape(logits_BTV.shape[:2])


def run_logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Float32 logits of every position that has a next token: (B, T - 1, V)."""
    logits: Tensor = model(**make_inputs(model, ids_BT)).logits
    return logits[:, :-1].float()


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


class SavedLoss:
    """The loss that steps of training saved, layer by layer: -gradient times movement, to first order.

    How far a layer moves says nothing under Adam, which moves every weight by about the learning rate.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._before: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}

    def before_step(self) -> None:
        """Keeps weights and gradients as they are before an update, and before clipping."""
        parameters = {id(each): each for layer in self._parameters for each in layer if each.grad is not None}
        self._before = {key: each.detach().clone() for key, each in parameters.items()}
        self._gradients = {key: each.grad.clone() for key, each in parameters.items() if each.grad is not None}

    def after_step(self) -> list[float]:
        """What the update saved by layer, nats: (L,)."""
        return [sum(self._saved_by(each) for each in layer) for layer in self._parameters]

    def _saved_by(self, parameter: Tensor) -> float:
        gradient = self._gradients.get(id(parameter))
        if gradient is None:
            return 0.0
        moved = parameter.detach() - self._before[id(parameter)]
        return -float((gradient * moved).sum(dtype=torch.float64))


@contextmanager
def asking_layers(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The decoder layers, whose parameters alone ask for gradients; the model is left as it was found."""
    layers = list(find_decoder_parts(model).layers)
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(id(parameter) in inside and parameter.is_floating_point())
            parameter.grad = None
        with torch.enable_grad():
            yield layers
    finally:
        for parameter, flag in asked.items():
            parameter.grad = None
            parameter.requires_grad_(flag)


def _sum_squares(layer: nn.Module) -> float:
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return float(
        sum((gradient.double().square().sum() for gradient in gradients), torch.zeros((), dtype=torch.float64))
    )
