"""The hybrid for vLLM: its Qwen3 layers, and its NemotronH blocks two by two, in one model.

vLLM makes of this the same tokens as transformers of `causal_lm.py`. States of Mamba2 layers are float32, whatever the rest is.
Beside `eval/generation.py`, which registers it, the only module that imports vllm.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.nemotron_h import NemotronHMambaDecoderLayer, NemotronHMLPDecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    extract_layer_index,
    make_layers,
    maybe_prefix,
)

from layerplan.models.hybrid.nemotron import make_block_config

NAMES = WeightsMapper(
    orig_to_new_substr={".A_log": ".A"},
    orig_to_new_stacked={
        ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
        ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
        ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
        # with the part's name: a Nemotron layer has an up_proj that no gate goes with
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    },
)
"""From stored names to vLLM's, which holds some matrices together."""


class VllmNemotronLayer(nn.Module):
    """The two blocks of a Nemotron layer; each hands the sum of what came before to the next norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        shared: dict[str, Any] = {
            "layer_idx": extract_layer_index(prefix),
            "model_config": vllm_config.model_config,
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
        }
        mixing, feeding = (make_block_config(config, each) for each in ("linear_attention", "mlp"))
        self.mixer_block = NemotronHMambaDecoderLayer(mixing, **shared, prefix=f"{prefix}.mixer_block")
        self.feed_forward_block = NemotronHMLPDecoderLayer(feeding, **shared, prefix=f"{prefix}.feed_forward_block")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds, and the residual stream that it is to be added to; positions play no part."""
        hidden_states, residual = self.mixer_block(hidden_states, residual)
        return self.feed_forward_block(hidden_states, residual)


def build_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """The layer of a prefix, by the kind that the config has for its index; raises `ValueError` for one of no kind of vLLM's."""
    config = vllm_config.model_config.hf_config
    kind = config.layer_kinds[extract_layer_index(prefix)]
    if kind == "nemotron":
        return VllmNemotronLayer(vllm_config=vllm_config, prefix=prefix)
    if kind == "qwen3":
        return Qwen3DecoderLayer(config, vllm_config.cache_config, vllm_config.quant_config, prefix=prefix)
    raise ValueError(f"{prefix}: a layer of kind {kind!r} cannot be served; evaluation.backend: transformers scores it")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class VllmHybridModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: build_layer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of all tokens at hand, (tokens, width)."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class VllmHybridForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """What vLLM makes of a `HybridForCausalLM`."""

    hf_to_vllm_mapper = NAMES
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Dtypes of a Mamba2 layer's convolution window and of its state."""
        cache = vllm_config.cache_config
        dtypes: tuple[torch.dtype, ...] = MambaStateDtypeCalculator.mamba2_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )
        return dtypes

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        """Shapes of both."""
        sizes = make_block_config(vllm_config.model_config.hf_config, "linear_attention")
        return MambaStateShapeCalculator.mamba2_state_shape(
            intermediate_size=sizes.mamba_num_heads * sizes.mamba_head_dim,
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            n_groups=sizes.n_groups,
            num_heads=sizes.mamba_num_heads,
            head_dim=sizes.mamba_head_dim,
            state_size=sizes.ssm_state_size,
            conv_kernel=sizes.conv_kernel,
            num_spec=vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How vLLM copies both."""
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = VllmHybridModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of tokens."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Hidden states after the final norm."""
        states: torch.Tensor = self.model(input_ids, positions, inputs_embeds)
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of hidden states."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Places stored tensors; gives the names of what was placed."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=NAMES)
        return loaded
