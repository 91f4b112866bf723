"""Signal to noise of weight matrices, one at a time from their files (Spectrum, arXiv 2406.06623; its published code).

Of a matrix with singular values S, the noise level is sigma = IQR(S) / 1.349, as for a normal sample, and the edge of the
bulk sigma (1 + sqrt(m / n)), m <= n, after Marchenko and Pastur with their normalisation by n left out. What lies above
the edge is signal: SNR = sum of the signal / sum of the noise / max(S). Matrices are compared with others of their kind
only, so layers are compared by the mean over kinds of their rank, and not by sums of numbers of different kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerplan.errors import ModelError
from layerplan.plan.layer_evidence import rank_shares
from layerplan.plan.module_names import name_module

NORMAL_IQR = 1.349
"""Interquartile range of a normal distribution of deviation 1."""


@dataclass(frozen=True)
class Matrix:
    """A stored weight matrix, or a stack of them, of a decoder layer."""

    name: str
    """In its file."""
    file: str
    """Path of the file."""
    layer: int
    """Layer it belongs to."""
    kind: str
    """Its name inside the layer, indices of lists as `*`."""
    shape: tuple[int, ...]
    """Of the stored tensor; its last two are the matrix's."""

    @property
    def flops(self) -> float:
        """Of its singular values: 4 n m^2 - 4 m^3 / 3 for n >= m, by bidiagonalisation."""
        m, n = sorted(self.shape[-2:])
        return float(np.prod(self.shape[:-2])) * (4.0 * n * m**2 - 4.0 * m**3 / 3)


def compute_snr(singular_values: NDArray[np.floating], shape: tuple[int, int]) -> float:
    """Signal to noise of a matrix by its singular values.

    Args:
        singular_values: Of the matrix, in any order.
        shape: Rows and columns.

    Returns:
        The ratio, divided by the largest singular value; 0 when nothing is above the edge, and the sum of the signal in
        place of the ratio when nothing is below it, as the published code has it.
    """
    values = np.asarray(singular_values, dtype=np.float64)
    largest = float(values.max())
    if largest == 0.0:
        return 0.0
    low, high = np.quantile(values, [0.25, 0.75])
    edge = (high - low) / NORMAL_IQR * (1 + np.sqrt(min(shape) / max(shape)))
    is_signal = values > edge
    noise = float(values[~is_signal].sum()) if not is_signal.all() else 1.0
    signal = float(values[is_signal].sum())
    return signal / noise / largest if noise > 0 else 1.0 / largest


def read_snr(matrix: Matrix) -> float:
    """Reads one tensor and measures it; of a stack the mean over its matrices.

    Raises:
        ModelError: When it holds values that are not finite.
    """
    import torch
    from safetensors import safe_open

    with safe_open(matrix.file, framework="pt") as handle:
        weight = handle.get_tensor(matrix.name).float()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"{Path(matrix.file).name}: tensor {matrix.name} holds NaN or infinite values")
    rows, columns = matrix.shape[-2:]
    found = [
        compute_snr(torch.linalg.svdvals(each).double().numpy(), (rows, columns))
        for each in weight.reshape(-1, rows, columns)
    ]
    return float(np.mean(found))


def collect_kinds(
    matrices: Iterable[Matrix], ratios: Iterable[float], num_layers: int
) -> dict[str, list[float | None]]:
    """Signal to noise by kind of matrix, one per layer: the mean where a layer has several, None where it has none."""
    found: dict[str, list[list[float]]] = {}
    for matrix, ratio in zip(matrices, ratios, strict=True):
        found.setdefault(matrix.kind, [[] for _ in range(num_layers)])[matrix.layer].append(ratio)
    return {
        kind: [float(np.mean(ratios)) if ratios else None for ratios in layers]
        for kind, layers in sorted(found.items())
    }


def rate_layers(kinds: dict[str, list[float | None]]) -> list[float]:
    """Mean over the kinds of each layer's rank among layers of that kind, in (0, 1)."""
    with np.errstate(invalid="ignore"):
        return [float(value) for value in np.nanmean(rank_shares(list(kinds.values())), axis=0)]


def name_kind(name: str, layers_path: str) -> tuple[int, str] | None:
    """Layer and kind of a parameter by its name; None outside the layers."""
    match = re.match(rf"{re.escape(layers_path)}\.(\d+)\.(.+)$", name)
    if match is None:
        return None
    return int(match[1]), name_module(match[2])
