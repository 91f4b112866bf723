"""Any causal LM class of the installed transformers as a random model of some thousand parameters, float32, eval mode.

The config class says which sizes it has; each is made small by its kind (a width, a count of heads, a window), and factors
and bounds are set to what shows. What must fit together beyond that is in `FITTED`, per model type. Weights are drawn wider
than by default, since a tiny model at its default scale computes nearly the same whatever is left out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 4
VOCAB = 128
WINDOW = 8
SPECIAL = 3
"""Largest id of a special token."""
STD = 0.15
LARGEST = 4_000_000
"""Parameters beyond which a model is not tiny."""

KINDS: list[tuple[int | float, str]] = [
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab ngram_vocab_size_base audio_vocab_size"
        " max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions max_target_positions",
    ),
    (
        32,
        "hidden_size n_embd d_model dim_model embedding_size embedding_dim word_embed_proj_dim emb_dim lru_width"
        " input_embedding_size output_embedding_size mamba_d_ssm attention_hidden_size backbone_hidden_size cross_dim"
        " image_size",
    ),
    (
        48,
        "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff ffn_hidden_size d_inner"
        " feed_forward_size intermediate_size_mlp dense_intermediate_size",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"
        " shared_intermediate_size expert_ffn_hidden_size hidden_size_per_layer_input q_lora_rank kv_lora_rank o_lora_rank"
        " index_head_dim ple_embed_dim attention_head_dim router_hidden_size pronunciation_embed_dim shape_embed_dim"
        " index_n_heads prompt_mid_dim qk_head_dim num_mel_bins classifier_proj_size",
    ),
    (
        NUM_LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"
        " num_decoder_layers num_blocks num_attention_heads n_head n_heads num_heads attention_heads"
        " encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
        " num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num linear_num_value_heads"
        " swa_num_attention_heads mamba_num_heads mamba_n_heads index_topk block_size num_centroids swa_attention_heads"
        " patch_size linear_num_heads num_mem_heads n_mamba_heads hc_lowrank laurel_rank adapter_rank d_rel"
        " time_step_rank mamba_dt_rank rotary_dim lora_rank num_query_groups index_block_size prompt_length gated_norm_rank",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads"
        " n_group topk_group n_groups mamba_n_groups mamba_ngroups swa_num_key_value_heads linear_conv_kernel_dim conv_kernel"
        " mamba_d_conv conv_kernel_size conv1d_width hc_mult hc_count o_groups num_random_blocks sliding_window_pattern"
        " _sliding_window_pattern global_attn_every_n_layers no_rope_layer_interval index_topk_blocks attn_layer_period"
        " num_codebooks ple_conv_kernel_size moe_layer_interval max_window_layers centroid_intermediate_top_k",
    ),
    (
        1,
        "first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts attn_layer_offset"
        " num_expert_group moe_layer_start_index prefix_dense_sliding_window_pattern",
    ),
    (
        8,
        "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim"
        " mamba_d_head mamba_head_dim mamba_headdim d_head d_kv dim_head state_size ssm_state_size mamba_d_state kv_channels"
        " attention_head_size linear_head_dim rel_extent",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size local_attention attention_window_size keep_window_size"
        " attention_chunk_size chunk_size mamba_chunk_size local_attn_chunk_length lsh_attn_chunk_length mem_len",
    ),
    (STD, "initializer_range init_std embedding_initializer_range embed_init_std w_init_variance_scale"),
    (
        2.0,
        "attn_logit_softcapping final_logit_softcapping logits_soft_cap output_logit_soft_cap logits_scaling"
        " embedding_multiplier",
    ),
    (
        0.5,
        "attention_multiplier residual_multiplier logit_scale lm_head_multiplier key_multiplier ssm_out_multiplier"
        " attention_out_multiplier",
    ),
]
SIZES: dict[str, int | float] = {name: value for value, names in KINDS for name in names.split()}

MLA = {"num_key_value_heads": 4}
"""Latent attention gives every head a key of its own."""
GEMMA_3N = {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "intermediate_size": [48] * 4,
}  # fmt: skip
GEMMA_ASSISTANT = {
    "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "use_double_wide_mlp": False, "enable_moe_block": False,
}  # fmt: skip
MUSIC = {
    "text_encoder": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "audio_encoder": {"model_type": "encodec", "codebook_size": 64, "hidden_size": 32, "num_filters": 4},
}
QWEN4 = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "eos_token_id": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "split_ngram_parts": 8,
}  # fmt: skip
FLAGS = ("is_decoder", "use_sliding_window")
"""What an encoder's causal class must be told, and what a family is published with though its default lacks it."""
FITTED: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "longcat_flash": MLA,
    "minicpm3": MLA,
    "youtu": MLA,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
        "patch_in_forward": False,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "gemma3n_text": GEMMA_3N,
    "gemma3n": {"text_config": GEMMA_3N},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **GEMMA_ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **GEMMA_ASSISTANT}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": MLA | {"num_expert_group": 1, "topk_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "musicgen": {**MUSIC, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**MUSIC, "decoder": {"model_type": "musicgen_melody_decoder"}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "num_key_value_heads": 4},
    "zamba2": {"attention_hidden_size": 64, "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What must fit together, is chosen by no default, or is off by default, by model type."""


def list_model_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """The class `AutoModelForCausalLM` makes of a model type."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def make_config(model_type: str) -> PretrainedConfig:
    """A tiny config of a model type, with every kind of layer that its default has."""
    return _shrunk(CONFIG_MAPPING[model_type], FITTED.get(model_type, {}))


def make_model(model_type: str) -> nn.Module:
    """A random model of a model type, the same in every process.

    Raises:
        ValueError: When the config is not tiny, before any memory is taken.
    """
    config = make_config(model_type)
    with torch.device("meta"):
        size = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type}: {size} parameters are not tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                _widen(parameter)
    return model


def _widen(parameter: nn.Parameter) -> None:
    """Moves biases and norms off their initial values, and widens what came out narrow."""
    if parameter.ndim < 2:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    elif float(parameter.std()) < STD / 2:
        parameter.normal_(0.0, STD)


def _shrunk(config_class: type[PretrainedConfig], fitted: dict[str, Any]) -> PretrainedConfig:
    """The config class with every size that its default has replaced, and its parts likewise."""
    if config_class.has_no_defaults_at_init:
        return config_class(**{name: _part(value) for name, value in fitted.items()})
    default = config_class()
    values = dict(_sizes(default.to_dict()))
    for name in config_class.sub_configs:
        part = fitted.get(name, {})
        kind = type(getattr(default, name, None))
        if "model_type" in part:
            values[name] = _part(part)
        elif issubclass(kind, PretrainedConfig):
            values[name] = _shrunk(kind, part)
    values |= {name: value for name, value in fitted.items() if name not in config_class.sub_configs}
    return config_class(**values)


def _part(values: dict[str, Any]) -> PretrainedConfig:
    return _shrunk(CONFIG_MAPPING[values["model_type"]], {k: v for k, v in values.items() if k != "model_type"})


def _sizes(default: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in default.items():
        if isinstance(value, list) and name.endswith(("types", "type")):
            yield from _words(name, value)
        elif name in SIZES and isinstance(value, int | float | None) and not isinstance(value, bool):
            yield name, SIZES[name]
        elif name.endswith("token_id") and isinstance(value, int | list) and value != 0:
            yield name, min(value, SPECIAL) if isinstance(value, int) else [SPECIAL]
        elif name in FLAGS:
            yield name, True


def _words(name: str, words: list[Any]) -> Iterator[tuple[str, list[str]]]:
    """A list of one word per layer becomes a short one in which every word occurs."""
    kinds = list(dict.fromkeys(str(word) for word in words))
    if len(kinds) > 1:
        yield name, [kinds[index % len(kinds)] for index in range(NUM_LAYERS)]
