"""How much a layer turns the residual stream: 1 - cosine between what enters it and what leaves it (ShortGPT)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def compute_block_influence(states_LBTD: Tensor) -> list[float]:
    """Mean over all positions of 1 - cos(h_(l-1), h_l), from the residual stream around every layer.

    Args:
        states_LBTD: L + 1 states of B rows of T tokens, as `LayerRunner.run` gives them.

    Returns:
        L values in [0, 2].
    """
    return [
        float((1 - F.cosine_similarity(before.double(), after.double(), dim=-1)).mean())
        for before, after in pairwise(states_LBTD)
    ]
