"""A tokenizer as its file has it, where the class that transformers takes for it would split text otherwise.

Since version 5 `transformers` builds some tokenizers from the class that `tokenizer_config.json` names and takes no more than
vocabulary and merges from `tokenizer.json`. Many byte-level tokenizers are called `LlamaTokenizerFast` there, such as that of
DeepSeek-R1-Distill-Llama: that class cuts at `▁`, which they do not have, so that spaces are gone and the ids are others
(huggingface/transformers#45488, #45920). A corpus is encoded by the file, as the model was trained; so is everything else.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

PROBES = (
    "Hello  world, it's 2023: f(x) = 650841823\n\n\tdef f():\n        return 3.14\n",
    "  的意思是：甲乙丙。日本語 한국어 Привет мир",
    "é ﬁ Ａ ½ 🙂 https://a.b/c_d?e=1  ",
)
"""Text at which rules of splitting part: leading, double and trailing spaces, digits, contractions, line breaks, scripts."""


def follow_file(tokenizer: Any, file: Path, **options: Any) -> Any:
    """The tokenizer, or one that is its file and nothing else when that may give other ids.

    Args:
        tokenizer: As transformers' class for it made it.
        file: Its `tokenizer.json`.
        options: `pretrained_model_name_or_path` and what else it was loaded with.
    """
    from transformers import PreTrainedTokenizerFast

    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast or _gives_ids_of(tokenizer, file):
        return tokenizer
    _tell(type(tokenizer).__name__, file)
    return PreTrainedTokenizerFast.from_pretrained(**options)


@cache
def _tell(name: str, file: Path) -> None:
    """Once in a process."""
    logger.info("%s splits text otherwise than %s; the file is followed", name, file)


def _gives_ids_of(tokenizer: Any, file: Path) -> bool:
    """Whether both have the same rules of splitting, and the same ids of text at which such rules part."""
    written, made = Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer
    written.no_truncation()
    written.no_padding()
    for one, other in ((written.normalizer, made.normalizer), (written.pre_tokenizer, made.pre_tokenizer)):
        if (one and one.__getstate__()) != (other and other.__getstate__()):
            return False
    return all(
        tokenizer(text, add_special_tokens=is_whole).input_ids == written.encode(text, add_special_tokens=is_whole).ids
        for text in PROBES
        for is_whole in (False, True)
    )
