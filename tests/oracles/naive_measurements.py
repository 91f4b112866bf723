"""Rival measurements as their papers and published code say them, one number at a time; imports nothing of layerplan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch


def spectrum_snr(weight: np.ndarray) -> float:
    """Spectrum (arXiv 2406.06623), as its published code takes it: every matrix by a full decomposition."""
    _, singular, _ = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    ordered = sorted(float(value) for value in singular)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    sigma = (quantile(0.75) - quantile(0.25)) / 1.349
    n, m = weight.shape
    beta = n / m if n < m else m / n
    edge = sigma * math.sqrt((1 + math.sqrt(beta)) ** 2)
    signal = sum(value for value in ordered if value > edge)
    below_edge = [value for value in ordered if value <= edge]
    noise = sum(below_edge) if below_edge else 1.0
    return signal / noise / ordered[-1]


def spectrum_unfrozen(snr: Mapping[str, float], top_percent: int) -> list[str]:
    """Modules that Spectrum's published code lists under `unfrozen_parameters`, by their names and numbers.

    A module's type is what follows the first number in its name; of each type the top percentage is taken, rounded down.
    """
    types: dict[str, list[tuple[str, float]]] = {}
    for name, value in snr.items():
        parts = name.split(".")
        place = next(index for index, part in enumerate(parts) if part.isdigit())
        types.setdefault(".".join(parts[place + 1 :]), []).append((name, value))
    chosen = []
    for modules in types.values():
        ordered = sorted(modules, key=lambda pair: pair[1], reverse=True)
        chosen += [name for name, _ in ordered[: int(len(modules) * top_percent / 100)]]
    return chosen


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Mean next-token loss, position by position."""
    logits = model(input_ids=ids).logits
    total, count = torch.zeros(()), 0
    for row in range(ids.shape[0]):
        for place in range(ids.shape[1] - 1):
            label = ids[row, place + 1] if labels is None else labels[row, place]
            total = total - torch.log_softmax(logits[row, place], -1)[label]
            count += 1
    return total / count


def gradient_norms(model: Any, ids: torch.Tensor, labels: torch.Tensor | None = None) -> list[float]:
    """Norm of each layer's gradient, one parameter after the other; of the loss on other labels if given."""
    norms = []
    for layer in model.model.layers:
        squares = 0.0
        for parameter in layer.parameters():
            (gradient,) = torch.autograd.grad(loss_of(model, ids, labels), parameter)
            squares += sum(float(value) ** 2 for value in gradient.flatten())
        norms.append(math.sqrt(squares))
    return norms


def fisher_trace(model: Any, ids: torch.Tensor) -> list[float]:
    """The trace itself: every label of every position, weighted by its probability; per predicted token."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    log_probs = torch.log_softmax(logits, -1)
    totals = [0.0] * len(model.model.layers)
    for position in log_probs:
        for log_prob in position:
            for number, layer in enumerate(model.model.layers):
                gradients = torch.autograd.grad(log_prob, list(layer.parameters()), retain_graph=True)
                totals[number] += float(log_prob.detach().exp()) * sum(float(each.square().sum()) for each in gradients)
    return [total / len(log_probs) for total in totals]


def block_influence(model: Any, ids: torch.Tensor) -> list[float]:
    """ShortGPT: 1 - cosine of a layer's input and output, position by position."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    influence = []
    for before, after in seen:
        rows = zip(before.flatten(0, 1).double(), after.flatten(0, 1).double())
        values = [1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in rows]
        influence.append(sum(values) / len(values))
    return influence


def residual_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream before the first layer and after each, (positions, width) of one row."""
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    first = layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    after = [
        layer.register_forward_hook(
            lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out).detach()[0])
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids[None])
    for handle in [first, *after]:
        handle.remove()
    return [state.double() for state in seen]


def lens_gains(model: Any, fitted: Sequence[torch.Tensor], asked: Sequence[torch.Tensor]) -> list[list[float]]:
    """Tuned lens by least squares: gain of each layer on each asked row, translators fitted on the other rows.

    The map is the identity plus what ridge regression finds of (final - state), whose penalty is 1e-3 of the mean variance.
    """
    known = [torch.cat(states) for states in zip(*(residual_states(model, row) for row in fitted))]
    gains = []
    for row in asked:
        losses = []
        states = residual_states(model, row)
        for place, state in enumerate(states):
            carried = state
            if place < len(states) - 1:
                x, y = known[place].numpy(), known[-1].numpy()
                centred, gap = x - x.mean(0), (y - y.mean(0)) - (x - x.mean(0))
                penalty = math.sqrt(1e-3 * (centred**2).sum(0).mean())
                stacked = np.vstack([centred, penalty * np.eye(x.shape[1])])
                shift = np.linalg.lstsq(stacked, np.vstack([gap, np.zeros((x.shape[1],) * 2)]), rcond=None)[0]
                moved = y.mean(0) + (state.numpy() - x.mean(0)) @ (np.eye(x.shape[1]) + shift)
                carried = torch.as_tensor(moved)
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(carried.float()))
            nats = [-float(torch.log_softmax(logits[t], -1)[row[t + 1]]) for t in range(len(row) - 1)]
            losses.append(sum(nats) / len(nats))
        gains.append([before - after for before, after in pairwise(losses)])
    return gains


def saved_losses(model: Any, batches: Sequence[torch.Tensor], rate: float) -> list[list[float]]:
    """Plain AdamW on all parameters, clipped at 1: -gradient times movement of each layer in each step."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    saved = []
    for ids in batches:
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        before = [[p.detach().clone() for p in layer.parameters()] for layer in model.model.layers]
        raw = [[p.grad.clone() for p in layer.parameters()] for layer in model.model.layers]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        saved.append(
            [
                -sum(
                    float((gradient.double() * (p.detach().double() - old.double())).sum())
                    for p, old, gradient in zip(layer.parameters(), olds, gradients)
                )
                for layer, olds, gradients in zip(model.model.layers, before, raw)
            ]
        )
    return saved
