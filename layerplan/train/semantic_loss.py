"""SALF's losses: how near the states that enter the head are to the semantic bases of their labels.

The head's matrix is replaced by the bases at length 1 (`layerplan/models/semantic_bases.py`), which do not train. What a
chunk of positions needs is all that is ever held: the cross-entropy runs through the same pass as the ordinary loss, and
the cosine distance reads one basis per position. Shapes: N positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from layerplan.models.semantic_bases import scale_to_units
from layerplan.train.loss import IGNORED, compute_loss_sum


def compute_similarity_loss_sum(hidden_ND: Tensor, units_VD: Tensor, labels_N: Tensor, *, scale: float = 1.0) -> Tensor:
    """Summed cross-entropy whose logits are cosines with every label's basis (Algorithm 1), a float32 scalar.

    Args:
        hidden_ND: States that enter the head.
        units_VD: Bases at length 1, float32.
        labels_N: Token ids or IGNORED.
        scale: As in `compute_loss_sum`.
    """
    return compute_loss_sum(scale_to_units(hidden_ND.float()), units_VD, labels_N, scale=scale)


def compute_cosine_loss_sum(hidden_ND: Tensor, units_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cosine distance to the label's own basis (Algorithm 2), a float32 scalar; arguments as above."""
    is_asked = labels_N != IGNORED
    cosine_N = (scale_to_units(hidden_ND.float()) * units_VD[labels_N.clamp_min(0)]).sum(-1)
    return ((1 - cosine_N) * is_asked).sum()
