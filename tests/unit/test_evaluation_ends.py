"""Where a greedy answer ends under transformers: vLLM ends it at the tokenizer's end of text too (its own code, by hand)."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_model

from eval.engine import EngineSpec
from eval.logits import TransformersEngine
from layerplan.models.ref import ModelRef
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_tokenizer import BYTES, make_bytes, save_tokenizer

PROMPT = (72, 101, 108, 108, 111)


def answer(folder: Path, end: str | None, config_end: int | None) -> list[int]:
    """Six greedy tokens of a model whose files name these ends."""
    said = {} if end is None else {"eos_token": end}
    files = {"config": TINY_QWEN3 | {"vocab_size": 257, "eos_token_id": config_end}}
    save_tokenizer(folder, make_bytes(), control=("<eos>",), tokenizer_config=said, **files)
    save_model(build_tiny_qwen3(vocab_size=257), str(folder / "model.safetensors"))
    engine = TransformersEngine(EngineSpec(ModelRef(str(folder)), "transformers", "float32", 0, (36, 37), 64))
    (found,) = engine.ask([PROMPT], [6])
    return found.token_ids


@pytest.mark.parametrize("config_end", [None, 256])
def test_an_answer_ends_where_the_tokenizer_or_the_model_says(config_end: int | None, tmp_path: Path) -> None:
    whole = answer(tmp_path / "plain", "<eos>", config_end)
    assert len(whole) == 6 and 256 not in whole
    last = whole[3]
    first = whole.index(last)
    assert answer(tmp_path / "tokenizer", BYTES[last], config_end) == whole[:first]
    assert answer(tmp_path / "config", "<eos>", last) == whole[:first]
