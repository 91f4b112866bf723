"""The boundary's formulas as loops, from the paper (Eq. 7) and the definition of the tests, one number at a time."""

from __future__ import annotations

import math
from itertools import product


def normalize(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def mean(values):
    return math.fsum(values) / len(values)


def score(particle, sensitivity, k):
    """S(k) of the normalised profiles; blocks 1..k are shallow."""
    particle, sensitivity = normalize(particle), normalize(sensitivity)
    return mean(sensitivity[:k]) - mean(sensitivity[k:]) + mean(particle[k:]) - mean(particle[:k])


def rate(particle, sensitivity, rule, min_side):
    """Rating by boundary: S(k) or its standardised form, where both sides have a value of both profiles."""
    num_layers = len(particle)
    rated = {}
    for k in range(1, num_layers - 1):
        if rule == "paper":
            rated[k] = score(particle, sensitivity, k)
        elif k >= min_side and num_layers - k >= min_side:
            rated[k] = score(particle, sensitivity, k) * math.sqrt(k * (num_layers - k)) / num_layers
    return rated


def best(particle, sensitivity, rule, min_side):
    rated = rate(particle, sensitivity, rule, min_side)
    top = max(rated.values())
    return min(k for k, value in rated.items() if value >= top - 1e-9)


def shift_p(particle, sensitivity, rule, min_side):
    """Share of all pairs of circular shifts whose best rating is at least the measured one."""
    observed = max(rate(particle, sensitivity, rule, min_side).values())
    pairs = list(product(range(len(particle)), range(len(sensitivity))))
    reached = 0
    for first, second in pairs:
        moved = particle[first:] + particle[:first], sensitivity[second:] + sensitivity[:second]
        reached += max(rate(*moved, rule, min_side).values()) >= observed - 1e-9
    return reached / len(pairs)


def block_p(particle, sensitivity, rule, min_side, rng, resamples):
    """Share of random orders of blocks whose best rating is at least the measured one, the measured order included."""
    size = 4 if len(particle) >= 16 else 2
    observed = max(rate(particle, sensitivity, rule, min_side).values())
    reached = 1
    for _ in range(resamples):
        moved = []
        for values in (particle, sensitivity):
            blocks = [values[start : start + size] for start in range(0, len(values), size)]
            rng.shuffle(blocks)
            moved.append([value for block in blocks for value in block])
        reached += max(rate(*moved, rule, min_side).values()) >= observed - 1e-9
    return reached / (resamples + 1)
