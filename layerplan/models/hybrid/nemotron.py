"""The Nemotron layer: a Mamba2 mixer block and its squared-ReLU feed-forward block, counted as one layer.

Both blocks are transformers' own, the mixer with kernels that are chosen (`mamba_mixer.py`). A packed row is mixed document
by document by the PyTorch scan, which takes the starts of documents and does not look; kernels look.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, initialization
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHMamba2Mixer

from layerplan.models.hybrid.mamba_mixer import Mamba2Mixer


@dataclass(frozen=True, eq=False)
class Documents:
    """Pieces of packed rows; an object of its own, at whose content no compiled graph looks."""

    index_BT: Tensor
    """Of each token's document in its row."""

    @cached_property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Row, first position, and the position after the last, in order; reads what may lie on a device."""
        found: list[tuple[int, int, int]] = []
        for row, indices in enumerate(self.index_BT.tolist()):
            starts = [at for at, index in enumerate(indices) if at == 0 or index != indices[at - 1]]
            found += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True)]
        return found


SIZES: dict[str, int | float | str | bool] = {
    "intermediate_size": 4096,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "chunk_size": 128,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "layer_norm_epsilon": 1e-5,
}
"""Fields of NemotronH that such a layer reads, and their values where the config names none."""


class NemotronLayer(nn.Module):
    """Mixes positions by a Mamba2 state, then passes the feed-forward block; each block checkpoints itself."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        mixing = make_block_config(config, "linear_attention")
        self.mixer_block = NemotronHBlock(mixing, layer_idx)
        self.mixer_block.mixer = Mamba2Mixer(mixing, layer_idx)
        self.feed_forward_block = NemotronHBlock(make_block_config(config, "mlp"), layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        documents: Documents | None = None,
        **_: Any,
    ) -> Tensor:
        """The residual stream after both blocks.

        Args:
            hidden_states: (batch, tokens, width).
            attention_mask: (batch, tokens), zero where there is padding; None when there is none.
            past_key_values: transformers' cache.
            documents: Pieces of the rows that know nothing of each other.
        """
        if documents is None or past_key_values is not None:
            mixed = self.mixer_block(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask)
        elif self.mixer_block.mixer.kernels == "torch":
            mixed = _mix_documents(self.mixer_block, hidden_states, documents)
        else:
            mixed = self.mixer_block(hidden_states, documents_BT=documents.index_BT)
        result: Tensor = self.feed_forward_block(mixed)
        return result


@torch.compiler.disable
def _mix_documents(block: Callable[..., Tensor], hidden_states: Tensor, documents: Documents) -> Tensor:
    """Every document by itself; lengths differ from row to row, so no graph is compiled of it."""
    if len(documents.pieces) == len(hidden_states):
        return block(hidden_states)
    pieces = [block(hidden_states[row : row + 1, start:stop]) for row, start, stop in documents.pieces]
    return torch.cat(pieces, dim=1).view_as(hidden_states)


def check_sizes(values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a size that the layer does not have, or of a value that it cannot have."""
    for name in values:
        if name not in SIZES:
            nearest = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name!r} is no size of it; the nearest is {nearest!r}")
    sizes: dict[str, Any] = SIZES | dict(values)
    for name, value in values.items():
        wanted: type = type(SIZES[name])
        if not isinstance(value, wanted) or (isinstance(value, int) and wanted is int and value < 1):
            raise ValueError(f"{name}={value!r} must be {'a positive integer' if wanted is int else wanted.__name__}")
    width = sizes["mamba_num_heads"] * sizes["mamba_head_dim"]
    if sizes["mamba_num_heads"] % sizes["n_groups"] or width % sizes["n_groups"]:
        raise ValueError(f"n_groups={sizes['n_groups']} must divide mamba_num_heads={sizes['mamba_num_heads']}")


def initialize(module: nn.Module, config: Any) -> None:
    """Mamba2's own values for what transformers' general rule does not know (Dao and Gu, 2024).

    A = 1, 2, ... per head, D = 1, time steps log-uniform in [time_step_min, time_step_max], and output projections narrower
    by the root of the number of residual branches.
    """
    depth = math.sqrt(2 * config.num_hidden_layers)
    if isinstance(module, NemotronHMamba2Mixer):
        heads = torch.arange(1, module.num_heads + 1, dtype=torch.float32, device=module.A_log.device)
        initialization.copy_(module.A_log, heads.log())
        initialization.ones_(module.D)
        initialization.copy_(module.dt_bias, _draw_time_steps(module))
        initialization.normal_(module.out_proj.weight, std=config.initializer_range / depth)
    elif isinstance(module, NemotronLayer):
        down = module.feed_forward_block.mixer.down_proj.weight
        initialization.normal_(down, std=config.initializer_range / depth)


def _draw_time_steps(mixer: NemotronHMamba2Mixer) -> Tensor:
    """Biases whose softplus is log-uniform."""
    config: Any = mixer.config
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    steps = (torch.rand(mixer.num_heads, device=mixer.dt_bias.device) * (high - low) + low).exp()
    steps = steps.clamp(min=config.time_step_floor)
    return steps + torch.log(-torch.expm1(-steps))


def make_block_config(config: Any, block_type: str) -> NemotronHConfig:
    """NemotronH's config of a model all of whose blocks are of one type, so that a block has the hybrid's layer index."""
    sizes: dict[str, Any] = SIZES | (config.kind_sizes or {}).get("nemotron", {})
    return NemotronHConfig(
        hidden_size=config.hidden_size,
        layers_block_type=[block_type] * config.num_hidden_layers,
        initializer_range=config.initializer_range,
        **sizes,
    )
