"""A tokenizer as its file has it, whatever class transformers takes for it and whatever else its folder says.

Since version 5 `transformers` builds some tokenizers from the class that `tokenizer_config.json` names and takes no more than
vocabulary and merges from `tokenizer.json`. Many byte-level tokenizers are called `LlamaTokenizerFast` there, such as that of
DeepSeek-R1-Distill-Llama: that class cuts at `▁`, which they do not have, so that spaces are gone and the ids are others
(huggingface/transformers#45488, #45920). Entries that `tokenizer_config.json` alone adds and flags it gives to others change ids
too, and a `tekken.json` beside the file brings a class of Mistral's own. A corpus is encoded by the file, as the model was
trained; so is everything else.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CONFIG_NAME = "tokenizer_config.json"

PROBES = (
    "Hello  world, it's 2023: f(x) = 650841823\n\n\tdef f():\n        return 3.14\n",
    "  的意思是：甲乙丙。日本語 한국어 Привет мир",
    "é ﬁ Ａ ½ 🙂 https://a.b/c_d?e=1  ",
)
"""Text at which rules of splitting part: leading, double and trailing spaces, digits, contractions, line breaks, scripts."""


def follow_file(tokenizer: Any, file: Path, **options: Any) -> Any:
    """The tokenizer with the ids of its file: the same entries, splitting and added tokens, whatever else its folder says.

    Entries that only `tokenizer_config.json` adds have no row in the model's embeddings that a corpus was ever encoded
    with, and are left out.

    Args:
        tokenizer: As transformers' class for it made it.
        file: Its `tokenizer.json`.
        options: `pretrained_model_name_or_path` and what else it was loaded with.
    """
    from transformers import PreTrainedTokenizerFast

    written = _read(file)
    if written.decoder is None and getattr(tokenizer, "is_fast", False):
        written.decoder = tokenizer.backend_tokenizer.decoder  # ids are the file's; how they read, it does not say
    if not getattr(tokenizer, "is_fast", False):  # written in Python, or Mistral's own for its tekken.json
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**options)
    elif not _splits_as(tokenizer, written):
        _tell(type(tokenizer).__name__, file)
        named = tokenizer.special_tokens_map
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**options)
        for role in set(named) & set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) - set(tokenizer.special_tokens_map):
            setattr(tokenizer, role, named[role])  # what the class calls its tokens where no file does
    tokenizer._tokenizer, tokenizer.split_special_tokens = written, False
    for role in ("bos_token", "eos_token"):  # else an unknown text's id stands for it
        if getattr(tokenizer, role) is not None and written.token_to_id(str(getattr(tokenizer, role))) is None:
            setattr(tokenizer, role, None)
    return tokenizer


def name_plain_class(folder: Path) -> str | None:
    """Has whoever opens a written model folder split text as its `tokenizer.json` says, so as the model was trained.

    Args:
        folder: With the files of its base. `tokenizer_config.json` is changed, or made, where the class that transformers
            takes splits otherwise, and left alone where that is code of the model's own.

    Returns:
        The class that was replaced; None where it stays.
    """
    from transformers import AutoTokenizer

    file, path = folder / "tokenizer.json", folder / CONFIG_NAME
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not file.is_file() or "auto_map" in said:
        return None
    try:
        taken = AutoTokenizer.from_pretrained(str(folder))
        if not getattr(taken, "is_fast", False) or _splits_as(taken, _read(file)):
            return None
        named = follow_file(taken, file, pretrained_model_name_or_path=str(folder)).special_tokens_map
    except Exception as error:  # a class's code over a file of any shape; loading for training has told before
        logger.info("%s: whether its class splits text as tokenizer.json was not found out (%s)", folder, error)
        return None
    write_plain_class(path, {role: token for role, token in named.items() if isinstance(token, str)} | said)
    replaced = type(taken).__name__
    logger.info(
        "%s names PreTrainedTokenizerFast, since %s splits text otherwise than tokenizer.json", path.name, replaced
    )
    return replaced


def write_plain_class(path: Path, said: dict[str, Any]) -> None:
    """Writes a `tokenizer_config.json` of these values by which transformers takes the rules of `tokenizer.json`."""
    content = json.dumps(said | {"tokenizer_class": "PreTrainedTokenizerFast"}, ensure_ascii=False, indent=2)
    path.write_text(content, encoding="utf-8")


@cache
def _tell(name: str, file: Path) -> None:
    """Once in a process."""
    logger.info("%s splits text otherwise than %s; the file is followed", name, file)


def _read(file: Path) -> Tokenizer:
    """The file's tokenizer without what is meant for other uses: truncation, padding, random merges."""
    try:
        written = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{file.name}: {error}") from None
    written.no_truncation()
    written.no_padding()
    if getattr(written.model, "dropout", None):
        written.model.dropout = None
    return written


def _splits_as(tokenizer: Any, written: Tokenizer) -> bool:
    """Whether a class has the file's rules of splitting, and the same ids of text at which such rules part."""
    made = tokenizer.backend_tokenizer
    for one, other in ((written.normalizer, made.normalizer), (written.pre_tokenizer, made.pre_tokenizer)):
        if (one and one.__getstate__()) != (other and other.__getstate__()):
            return False
    return all(
        tokenizer(text, add_special_tokens=is_whole).input_ids == written.encode(text, add_special_tokens=is_whole).ids
        for text in PROBES
        for is_whole in (False, True)
    )
