"""Output semantic bases of a head's labels (SALF, section 2.1): rows of the pseudoinverse of the head's matrix.

Row i of pinv(W) is (W^T W)^-1 w_i, so that one D x D factor serves every label and no V x V matrix is ever made.
Shapes: N labels, V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 4096
"""Rows of a head that are taken to float64 at once."""


class SemanticBases:
    """Where the labels of a head lie in the space of the states that enter it.

    Args:
        weight_VD: The head's weight; rows are labels. A second matrix of its shape, in float32, is made by `get_units`.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight = weight_VD.detach()
        self._factor_DD: Tensor | None = None
        self._units_VD: Tensor | None = None

    def compute(self, rows_ND: Tensor) -> Tensor:
        """Bases of labels by their rows of the head, (N, D) in float64, by a Cholesky factor made once."""
        if self._factor_DD is None:
            # a few thousand rows at a time: all of W in float64 would be twice the model's largest matrix
            gram = sum(rows.double().T @ rows.double() for rows in self._weight.split(ROWS_AT_ONCE))
            gram += torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * gram.diagonal().mean() * 1e-12
            self._factor_DD = torch.linalg.cholesky(gram)
        return torch.cholesky_solve(rows_ND.double().T, self._factor_DD).T

    def compute_units(self, labels_N: Tensor) -> Tensor:
        """Bases of some labels at length 1: (N, D) in float64."""
        return scale_to_units(self.compute(self._weight[labels_N]))

    def get_units(self) -> Tensor:
        """Every label's basis at length 1: (V, D) in float32, made at the first call."""
        if self._units_VD is None:
            units = torch.empty(self._weight.shape, dtype=torch.float32, device=self._weight.device)
            for rows, into in zip(self._weight.split(ROWS_AT_ONCE), units.split(ROWS_AT_ONCE), strict=True):
                into.copy_(scale_to_units(self.compute(rows)))
            self._units_VD = units
        return self._units_VD


def scale_to_units(rows_ND: Tensor) -> Tensor:
    """Rows at length 1."""
    return torch.nn.functional.normalize(rows_ND, dim=-1)
