"""Decoder families from transformers as random models of a few thousand parameters, in eval mode, float32."""

from __future__ import annotations

import torch
import transformers as hf

VOCAB = 97
ATTENTION = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ATTENTION |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "initializer_range": 0.3}


def make_config(family: str):
    """The config of one tiny model; every family has its own peculiarity switched on."""
    if family == "qwen3":
        return hf.Qwen3Config(**ATTENTION, num_hidden_layers=4, head_dim=8, tie_word_embeddings=True)
    if family == "llama":
        return hf.LlamaConfig(**ATTENTION, num_hidden_layers=4, tie_word_embeddings=False)
    if family == "gpt2":
        return hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3)
    if family == "gemma2":
        return hf.Gemma2Config(
            **ATTENTION, num_hidden_layers=4, head_dim=8, sliding_window=32, query_pre_attn_scalar=8,
            final_logit_softcapping=3.0, attn_logit_softcapping=5.0,
        )  # fmt: skip
    if family == "olmo2":
        return hf.Olmo2Config(**ATTENTION, num_hidden_layers=4)
    if family == "mamba2":
        return hf.Mamba2Config(
            **MAMBA, num_hidden_layers=4, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8,
            tie_word_embeddings=False,
        )  # fmt: skip
    if family == "nemotron_h":
        return hf.NemotronHConfig(
            **ATTENTION, head_dim=8, layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
        )  # fmt: skip
    if family == "qwen3_next":
        return hf.Qwen3NextConfig(
            **ATTENTION, num_hidden_layers=4, head_dim=8, linear_conv_kernel_dim=2, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        )  # fmt: skip
    if family == "layerplan_hybrid":
        from layerplan.models.hybrid import HybridConfig

        sizes = {"intermediate_size": 48, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
        return HybridConfig(
            **ATTENTION, head_dim=8, tie_word_embeddings=True, layer_kinds=["nemotron", "qwen3"] * 2,
            kind_sizes={"nemotron": {**sizes, "chunk_size": 8}},
        )  # fmt: skip
    if family == "olmo":
        return hf.OlmoConfig(**ATTENTION, num_hidden_layers=4)
    if family == "opt":
        return hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=4,
            max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
        )  # fmt: skip
    if family == "llama4_text":
        return hf.Llama4TextConfig(
            **ATTENTION, num_hidden_layers=4, head_dim=8, intermediate_size_mlp=48, num_local_experts=4,
            num_experts_per_tok=1, pad_token_id=0,
        )  # fmt: skip
    raise ValueError(family)


def make_model(family: str):
    """A random model; biases and norms are random too, so that nothing holds only for their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = hf.AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and ("bias" in name or "norm" in name or "ln_" in name):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
