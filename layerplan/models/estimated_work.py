"""A layer's work estimated from its parameters, for a model whose code cannot run without values.

Every matrix is taken to be read once per token, of a stack of experts as many as the config says, and attention to be
as wide as the config says.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from layerplan.models.causal_lm import DecoderParts
from layerplan.models.layer_work import LayerWork, ModelWork, is_expert_stack

_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k")


def estimate_work(model: nn.Module, parts: DecoderParts) -> ModelWork:
    """Returns the work by sizes; the same for all layers of the same parameters."""
    config = _text_config(model)
    head = [parameter for parameter in parts.lm_head.parameters() if parameter.dim() > 1]
    layers = tuple(_estimate_layer(layer, config) for layer in parts.layers)
    hidden_size = _fact(config, "hidden_size") or head[0].shape[-1]
    return ModelWork(layers, hidden_size, 2.0 * sum(parameter.numel() for parameter in head))


def _estimate_layer(layer: nn.Module, config: Any) -> LayerWork:
    active = next((value for name in _ACTIVE_EXPERTS if isinstance(value := _fact(config, name), int)), 0)
    matrices, is_routed = 0.0, False
    for path, module in layer.named_modules():
        count, of_how_many = _own_matrices(module), _num_experts(layer, path, module)
        is_routed |= of_how_many > 1
        matrices += count * min(1.0, active / of_how_many) if active and of_how_many > 1 else count
    heads = _fact(config, "num_attention_heads") or 1
    head_dim = _fact(config, "head_dim") or (_fact(config, "hidden_size") or 0) // heads
    return LayerWork(2 * matrices, 0.0, 4.0 * heads * head_dim, 0.0, (), active if is_routed else 0)


def _own_matrices(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)


def _num_experts(layer: nn.Module, path: str, module: nn.Module) -> int:
    """Experts beside a module: the depth of its stack, or the length of the list of equals that it is in."""
    if is_expert_stack(module):
        return len(next(module.parameters(recurse=False)))
    names = path.split(".")
    lists = (layer.get_submodule(".".join(names[:end])) for end in range(1, len(names)))
    return next((len(item) for item in lists if isinstance(item, nn.ModuleList)), 1)


def _fact(config: Any, name: str) -> Any:
    """A setting of the config, or of a part of it, as DBRX keeps its experts in `ffn_config`."""
    if getattr(config, name, None) is not None:
        return getattr(config, name)
    for part in vars(config).values():
        if hasattr(part, "to_dict") and getattr(part, name, None) is not None:
            return getattr(part, name)
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
