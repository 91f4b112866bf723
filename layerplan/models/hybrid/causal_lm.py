"""The hybrid as transformers knows models: Qwen3's embedding, norm, rotary positions and head around any layers."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from layerplan.models.hybrid.config import HybridConfig
from layerplan.models.hybrid.layer_kinds import LAYER_KINDS
from layerplan.models.hybrid.nemotron import Documents

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}
"""How a layer's mask is made, by transformers' name of its type."""


class HybridLayer(ABC):  # noqa: B024 - what it is, is registered
    """Whatever classes a hybrid's layers have, as transformers' recorder of hidden states asks for one."""


class HybridPreTrainedModel(Qwen3PreTrainedModel):
    """What both classes share."""

    config_class = HybridConfig
    _is_stateful = True
    _can_record_outputs = {"hidden_states": HybridLayer, "attentions": Qwen3Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name in sorted(set(self.config.layer_kinds)):
            LAYER_KINDS[name].initialize(module, self.config)


class HybridModel(HybridPreTrainedModel):
    """Embedding, layers of several kinds, final norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LAYER_KINDS[name].layer_class(config, index) for index, name in enumerate(config.layer_kinds or ())
        )
        classes = {type(layer) for layer in self.layers}
        self._no_split_modules = sorted(HybridLayer.register(each).__name__ for each in classes)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (batch, tokens); either these or `inputs_embeds`.
            attention_mask: (batch, all tokens), or masks by layer type.
            position_ids: (batch, tokens); positions that restart tell attention where documents of a row begin.
            past_key_values: transformers' cache.
            inputs_embeds: (batch, tokens, width).
            use_cache: Keep keys, values and states.
            seq_idx: (batch, tokens), the index of each token's document in its row; layers that carry a state start anew
                where it changes.
            **kwargs: For the attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _count_positions(inputs_embeds, past_key_values, self.config)
        masks = attention_mask
        if not isinstance(masks, dict):
            given = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
            masks = {
                each: MASKS[each](config=self.config, inputs_embeds=inputs_embeds, **given)
                for each in dict.fromkeys(self.config.layer_types)
            }
        documents = None if seq_idx is None else Documents(seq_idx)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, name, layer_type in zip(self.layers, self.config.layer_kinds, self.config.layer_types, strict=True):
            options = kwargs | ({"documents": documents} if LAYER_KINDS[name].takes_documents else {})
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **options,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The hybrid with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, (batch, kept tokens, vocabulary), and the loss of the next token where there are labels.

        Args:
            input_ids: As of `HybridModel`, like those not named here.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: (batch, tokens), -100 where there is none.
            use_cache: As there.
            logits_to_keep: Of so many last tokens, or of those at these indices; 0 for all.
            seq_idx: As there.
            **kwargs: As there.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _count_positions(inputs_embeds: Tensor, past_key_values: Any, config: HybridConfig) -> Tensor:
    """Positions that follow those in the cache; a model without attention has none to count, and needs none."""
    counted = past_key_values is not None and set(config.layer_types) != {"linear_attention"}
    seen = past_key_values.get_seq_length() if counted else 0
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
