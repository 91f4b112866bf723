"""NemotronH's Mamba2 mixer, with kernels that are chosen and not found: see `mamba_kernels.py`.

transformers' own forward pass takes mamba-ssm wherever it is installed, CPU tensors included, and fails in training where
its companion for the convolution is missing. It also bounds the time step from below when it scans a row and not when it
continues a state; here it is not bounded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer, apply_mask_to_padding_states

from layerplan.models.hybrid.mamba_kernels import convolve, scan, step


class Mamba2Mixer(NemotronHMamba2Mixer):
    """Same parameters, same values."""

    kernels: str = "torch"
    """`torch` or `triton`."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        documents_BT: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What the mixer adds to the residual stream.

        Args:
            hidden_states: (batch, tokens, width).
            cache_params: transformers' cache.
            attention_mask: (batch, tokens), zero where there is padding; None when there is none.
            documents_BT: Index of each token's document; for kernels that start anew where it changes.
        """
        states = apply_mask_to_padding_states(hidden_states, attention_mask)
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, mixed, steps = self.in_proj(states).split(sizes, dim=-1)
        is_continued = cache_params is not None and cache_params.has_previous_state(self.layer_idx)
        mixed = apply_mask_to_padding_states(self._convolve(mixed, cache_params, documents_BT), attention_mask)
        groups = self.n_groups * self.ssm_state_size
        inputs, B, C = mixed.split([self.intermediate_size, groups, groups], dim=-1)
        inputs = inputs.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (each.unflatten(-1, (self.n_groups, self.ssm_state_size)) for each in (B, C))
        previous = cache_params.layers[self.layer_idx].recurrent_states[0] if is_continued else None
        A = -self.A_log.float().exp()
        if previous is not None and steps.shape[1] == 1:
            sizes_of_step = softplus(steps[:, 0] + self.dt_bias.to(steps.dtype))
            output, state = step(inputs[:, 0], sizes_of_step, A, B[:, 0], C[:, 0], self.D, previous)
        else:
            options = {"D_H": self.D, "step_bias_H": self.dt_bias, "chunk_size": self.chunk_size}
            options |= {"state_BHPN": previous, "documents_BT": documents_BT, "gives_state": cache_params is not None}
            output, state = scan(self.kernels, inputs, steps, A, B, C, **options)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, layer_idx=self.layer_idx)
        normed = self.norm(output.reshape(*hidden_states.shape[:2], -1), gate)
        added: Tensor = self.out_proj(normed.to(hidden_states.dtype))
        return added

    def _convolve(self, mixed_BTC: Tensor, cache: Any, documents_BT: Tensor | None) -> Tensor:
        tokens = mixed_BTC.shape[1]
        if cache is not None:
            window = {"conv_kernel_size": self.conv_kernel_size}
            mixed_BTC = cache.update_conv_state(mixed_BTC.transpose(1, 2), self.layer_idx, **window).transpose(1, 2)
        found = convolve(self.kernels, mixed_BTC, self.conv1d.weight.squeeze(1), self.conv1d.bias, documents_BT)
        activated: Tensor = self.act(found[:, -tokens:])
        return activated.to(mixed_BTC.dtype)


def set_mamba_kernels(model: nn.Module, kernels: str) -> int:
    """Has every Mamba2 mixer of a hybrid computed by kernels of this name; gives how many there are."""
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)]
    for mixer in mixers:
        mixer.kernels = kernels
    return len(mixers)
