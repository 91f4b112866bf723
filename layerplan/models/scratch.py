"""A small Qwen3-shaped base made on the spot: byte-level BPE from the corpus, then random weights.

The result is an ordinary Hugging Face folder (`config.json`, `tokenizer.json`, safetensors), so nothing after this
module knows that the model was not downloaded. The weights are a pure function of the config and the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from layerplan.config.model import ScratchModelConfig
from layerplan.errors import CorpusError
from layerplan.models.scratch_config import make_hf_config

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, out_dir: Path, max_length: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer and saves it as a folder transformers and vLLM open.

    Every byte has a token of its own, so any text round-trips and the letters A to D are single tokens.

    Args:
        texts: Training texts, read once.
        vocab_size: Upper bound on the vocabulary, the end-of-text token included.
        out_dir: Folder for `tokenizer.json` and `tokenizer_config.json`.
        max_length: Longest sequence of the model, in tokens.

    Raises:
        CorpusError: When there is no text at all.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_texts = 0

    def counted() -> Iterable[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer=trainer)
    if num_texts == 0:
        raise CorpusError("corpus.sources: no document to train the tokenizer on; at least one is needed")
    _save_tokenizer(tokenizer, out_dir, max_length)
    return tokenizer


def build_scratch_model(config: ScratchModelConfig, tokenizer: Tokenizer, out_dir: Path, *, seed: int) -> None:
    """Writes the random-weight model beside its tokenizer.

    Args:
        config: Sizes of the model.
        tokenizer: The trained tokenizer; its vocabulary sizes the embedding.
        out_dir: The tokenizer's folder.
        seed: Seed of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text_id is not None, "the trainer adds the special token"
    values = make_hf_config(config, vocab_size=tokenizer.get_vocab_size(), end_of_text_id=end_of_text_id)
    hf_config = AutoConfig.for_model(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.save_pretrained(out_dir)


def _save_tokenizer(tokenizer: Tokenizer, out_dir: Path, max_length: int) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
