"""SmolLM2-135M-Instruct, a published model out of an installed package, read as transformers reads it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import pre_tokenizers

from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.files import identify_model
from layerplan.models.gguf_cache import find_in_package
from tests.real_model import NUM_TEXTS, SMOLLM2

pytestmark = pytest.mark.real_model


def test_weights_and_tokens_are_those_of_transformers_own_reader_with_the_models_rule(
    smollm2: str, texts: list[str]
) -> None:
    pytest.importorskip("accelerate", reason="transformers' own reader of GGUF files wants accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_in_package(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = load_causal_lm(smollm2).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert len(texts) == NUM_TEXTS
    rule = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        rule
    )  # as the model's own tokenizer.json has it
    assert load_tokenizer(smollm2)(texts)["input_ids"] == reference(texts)["input_ids"]


def test_each_digit_is_split_off_before_anything_else(smollm2: str) -> None:
    """By GPT-2's rule two line breaks before a digit come apart."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


def test_the_identity_says_what_the_file_holds(smollm2: str) -> None:
    source = identify_model(smollm2).source
    assert source is not None and source.note == ""
    assert source.tensor_types == {"Q4_1": 210, "F32": 61, "Q8_0": 1}


def test_it_says_that_the_capital_of_france_is_paris(smollm2: str) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_causal_lm(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"
