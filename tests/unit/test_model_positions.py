"""How many positions a model has, whatever its config calls them; `transformers`' own tables are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from eval.preflight import check_lengths
from layerplan.errors import EvaluationError
from layerplan.models.positions import find_max_positions, read_max_positions
from layerplan.models.ref import ModelRef

TINY = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}


def save(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (hf.GPT2Config(**TINY, n_positions=64), "transformer.wpe"),
        (hf.OpenAIGPTConfig(**TINY, n_positions=48), "transformer.positions_embed"),
        (hf.GPTBigCodeConfig(**TINY, n_positions=56), "transformer.wpe"),
        (
            hf.GPTNeoConfig(
                vocab_size=32, hidden_size=8, num_layers=1, num_heads=1, attention_types=[[["global"], 1]],
                max_position_embeddings=40,
            ),
            "transformer.wpe",
        ),
    ],
)  # fmt: skip
def test_the_bound_is_the_rows_of_the_models_own_table(tmp_path: Path, config: Any, table: str) -> None:
    rows = hf.AutoModelForCausalLM.from_config(config).get_submodule(table).weight.shape[0]
    assert find_max_positions(str(save(tmp_path, config))) == rows


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({"model_type": "llama", "max_position_embeddings": 100}, 100),
        ({"model_type": "llama"}, hf.LlamaConfig().max_position_embeddings),
        ({"model_type": "gptj", "n_positions": 100}, 100),
        ({"model_type": "codegen", "n_positions": 100, "n_ctx": 50}, 100),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 100}}, 100),
        ({"model_type": "mpt", "max_seq_len": 100, "attn_config": {"alibi": False}}, 100),
        ({"model_type": "mpt", "max_seq_len": 100, "attn_config": {"alibi": True}}, None),
        ({"model_type": "falcon", "max_position_embeddings": 100}, 100),
        ({"model_type": "falcon", "max_position_embeddings": 100, "alibi": True}, None),
        ({"model_type": "bloom", "seq_length": 100}, None),
        ({"model_type": "mamba"}, None),
        ({"model_type": "mamba2"}, None),
        ({"model_type": "of_somebody", "max_sequence_length": 100}, 100),
        ({"model_type": "of_somebody", "n_ctx": 100}, 100),
        ({"model_type": "of_somebody"}, None),
    ],
)
def test_the_models_config_class_says_what_bounds_it(values: dict[str, Any], bound: int | None) -> None:
    assert read_max_positions(values) == bound


def test_a_prompt_too_long_for_gpt2_is_refused_by_its_questions_id(tmp_path: Path) -> None:
    model = ModelRef(str(save(tmp_path, hf.GPT2Config(**TINY, n_positions=64))))
    assert "max_position_embeddings" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(EvaluationError, match=r"question law/2 needs 500 tokens .* the model has 64 positions; 1 of 2"):
        check_lengths(model, [64, 500], ["law/1", "law/2"])
    check_lengths(model, [64], ["law/1"])


def test_a_model_without_positions_takes_any_prompt(tmp_path: Path) -> None:
    model = ModelRef(str(save(tmp_path, hf.MambaConfig(hidden_size=8, num_hidden_layers=1))))
    check_lengths(model, [100_000], ["law/1"])
