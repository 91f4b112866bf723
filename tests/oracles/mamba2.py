"""Mamba2's mixer of one document, position by position, from the recurrence of Dao and Gu (2024) and NemotronH's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def mix_naively(values: dict[str, Tensor], config: Any, hidden_TD: Tensor) -> Tensor:
    """What the mixer adds to each position of one document.

    Args:
        values: The mixer's parameters by their names.
        config: NemotronH's sizes.
        hidden_TD: Normed states of the document, of the parameters' dtype.
    """
    heads, width, groups = config.mamba_num_heads, config.mamba_head_dim, config.n_groups
    inner, states = heads * width, config.ssm_state_size
    gate, mixed, steps = (hidden_TD @ values["in_proj.weight"].T).split([inner, inner + 2 * groups * states, heads], -1)
    kernel = values["conv1d.weight"][:, 0]
    steps = softplus(steps + values["dt_bias"])
    A = -values["A_log"].exp()
    state = hidden_TD.new_zeros(heads, width, states)
    rows = []
    for at in range(len(hidden_TD)):
        convolved = values["conv1d.bias"]
        for back in range(min(at + 1, kernel.shape[1])):
            convolved = convolved + kernel[:, -1 - back] * mixed[at - back]
        x, B, C = silu(convolved).split([inner, groups * states, groups * states])
        x = x.view(heads, width)
        B, C = (each.view(groups, 1, states).expand(-1, heads // groups, -1).reshape(heads, states) for each in (B, C))
        state = state * (A * steps[at]).exp()[:, None, None]
        state = state + steps[at][:, None, None] * x[:, :, None] * B[:, None, :]
        rows.append((state @ C[:, :, None])[..., 0].add(values["D"][:, None] * x).reshape(inner))
    grouped = (torch.stack(rows) * silu(gate)).view(-1, groups, inner // groups)
    normed = grouped / (grouped.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
    return (normed.reshape(-1, inner) * values["norm.weight"]) @ values["out_proj.weight"].T
