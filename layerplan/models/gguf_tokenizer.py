"""The tokenizer of a GGUF file: built by `transformers`, then given what the file says of it and `transformers` leaves out.

A file names a rule by which text is split (`tokenizer.ggml.pre`), whether a text begins with the begin token and ends with
the end token, and whether a space is put before it. Tokens that differ from those a base was trained on are no error, only
a worse model; so a rule that neither `transformers` nor this module knows is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerplan.errors import ModelError, first_line
from layerplan.models.gguf_file import GgufFile

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
"""Kinds of vocabularies, by `tokenizer.ggml.model`."""
_CONTROL, _USER_DEFINED = 3, 4
"""Of `tokenizer.ggml.token_type`."""
_SPACE = "▁"
_SPLIT_BY_BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""GPT-2's: its own pattern splits, then bytes become characters."""
_BYTE_LEVEL = _SPLIT_BY_BYTE_LEVEL | {"use_regex": False}
_DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = [_SPLIT_BY_BYTE_LEVEL]
_DIGITS_THEN_GPT2 = [_DIGITS, _SPLIT_BY_BYTE_LEVEL]
_BLOOM = [_split(r" ?[^(\s|.,!?…。，、।۔،)]+"), _BYTE_LEVEL]
_DEEPSEEK_CODER = [
    *(_split(pattern) for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")),
    _DIGITS,
    _BYTE_LEVEL,
]
_FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    _SPLIT_BY_BYTE_LEVEL,
    {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
]
_RULES: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(["default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0"], _GPT2),
    **dict.fromkeys(["mellum", "exaone4", "roberta-bpe"], _GPT2),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], _DIGITS_THEN_GPT2),
    "minerva-7b": _DIGITS_THEN_GPT2,
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], _BLOOM),
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
}
"""How a rule splits text, as a `tokenizer.json` says it, where `transformers` has no pattern of the name."""
_SAME_AS = {"stablelm2": "qwen2", "hunyuan": "qwen2"}
"""Rules that split as another does, of which `transformers` has the pattern."""
_BY_ARCHITECTURE = {
    **dict.fromkeys(["qwen2", "qwen2moe"], "qwen2"),
    **{name: name for name in ("bloom", "falcon")},
    "gpt2": "gpt-2",
    "starcoder2": "starcoder",
}
"""The rule of files that name none, as all of before May 2024, where every model of an architecture then had the same."""
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_WHOLE_WORDS_FIRST = (*_LLAMA3, "tekken")
"""Rules under which a piece of text that is an entry is taken whole, whether or not merges lead to it. Their texts begin
with the begin token where the file does not say otherwise."""


def write_tokenizer(file: GgufFile, work: Path, out_dir: Path) -> None:
    """Writes `tokenizer.json` and its companions.

    Args:
        file: The GGUF file.
        work: Folder to make for the time of the call.
        out_dir: Where the model's folder is being made.

    Raises:
        ModelError: When the file's tokenizer is of a kind that cannot be built.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from layerplan.models.written_tokenizer import CONFIG_NAME, write_plain_class

    work.mkdir()  # transformers would read what lies beside the file, which may be another model's
    (work / "model.gguf").symlink_to(file.path.resolve())
    path = out_dir / "tokenizer.json"
    try:
        AutoTokenizer.from_pretrained(str(work), gguf_file="model.gguf").save_pretrained(out_dir)
        content = json.loads(path.read_text(encoding="utf-8"))
        mended = mend_tokenizer(content, file)
        if mended != content:
            path.write_text(json.dumps(mended, ensure_ascii=False, indent=2), encoding="utf-8")
            # classes named after models build their own rules anew
            config = out_dir / CONFIG_NAME
            write_plain_class(config, json.loads(config.read_text(encoding="utf-8")))
        Tokenizer.from_file(str(path))
    except Exception as error:  # a library's code over data of any shape
        kind = _read(file, "model")
        said = "none" if kind is None else repr(kind)
        raise ModelError(
            f"model.name={file.path}: its tokenizer ({said}) cannot be rebuilt ({first_line(error)}); convert the model's"
            " safetensors, or save its tokenizer.json with them"
        ) from None


def mend_tokenizer(content: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    """What `transformers` made of a file's tokenizer, with what it left out.

    Args:
        content: A parsed `tokenizer.json`; left as it is.
        file: Says how text is split, what stands before and after it.
    """
    kind, rule = _read(file, "model"), _read_rule(file)
    found = dict(content)
    if kind == BYTE_LEVEL:
        found |= _name_entries(content, file)
        steps = _RULES.get(rule) or _find_pattern(_SAME_AS.get(rule, rule))
        if steps:
            found["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        found["model"] = found["model"] | {"ignore_merges": rule in _WHOLE_WORDS_FIRST}
    elif kind == SENTENCEPIECE and not file.architecture.startswith("gemma"):  # Gemma's class has its own
        found |= _put_space_before(_read(file, "add_space_prefix") is not False)
    begins = _read(file, "add_bos_token")
    if begins is None:
        begins = kind == SENTENCEPIECE or (kind == BYTE_LEVEL and rule in _WHOLE_WORDS_FIRST)
    ends = bool(_read(file, "add_eos_token"))
    names = [_name_token(file, key) if is_put else None for key, is_put in (("bos", begins), ("eos", ends))]
    if any(names):
        found["post_processor"] = _put_around(*names)
    return found


def doubt_tokenizer(file: GgufFile) -> str:
    """Says so when a file names no rule of splitting text, or one that nobody here knows: GPT-2's is taken then."""
    rule = _read_rule(file)
    if _read(file, "model") != BYTE_LEVEL:
        return ""
    if _read(file, "pre") is None and file.architecture not in _BY_ARCHITECTURE:
        return (
            "the file names no rule by which text is split (tokenizer.ggml.pre), and text is split as GPT-2 does; of most"
            " models the tokens are others, so take a file converted after May 2024"
        )
    if rule in _RULES or rule in _SAME_AS or _find_pattern(rule):
        return ""
    return f"the tokenizer's rule {rule!r} is not known here, and text is split as GPT-2 does"


def _find_pattern(rule: str) -> list[dict[str, Any]]:
    """The steps of a rule that `transformers` knows; none of another."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return [_split(GGUF_PRE_TOKENIZER_SPLITS[rule]), _BYTE_LEVEL] if rule in GGUF_PRE_TOKENIZER_SPLITS else []


def _name_entries(content: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    """Vocabulary and added tokens by the file's own names and ids; control and user-defined tokens were added.

    A byte-level vocabulary is written in 256 characters. `transformers` spells what is not (`<｜end▁of▁sentence｜>`, two spaces)
    in them too: it becomes another entry, and the end of a text an id that the model has no row for.
    """
    kinds = _read(file, "token_type")
    if kinds is None:
        return {}
    tokens = _read(file, "tokens")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    return {"model": content["model"] | {"vocab": vocab}, "added_tokens": added}


def _put_space_before(is_put: bool) -> dict[str, Any]:
    """SentencePiece's own way: a space goes before every text, also before one that begins with a space."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}] if is_put else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if is_put else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _put_around(begin: tuple[int, str] | None, end: tuple[int, str] | None) -> dict[str, Any]:
    """A post-processor that puts tokens, each an id and a name, before and after a text."""

    def name(token: tuple[int, str] | None, segment: int) -> list[dict[str, Any]]:
        return [] if token is None else [{"SpecialToken": {"id": token[1], "type_id": segment}}]

    def place(which: str, segment: int) -> list[dict[str, Any]]:
        return [*name(begin, segment), {"Sequence": {"id": which, "type_id": segment}}, *name(end, segment)]

    tokens = {token[1]: {"id": token[1], "ids": [token[0]], "tokens": [token[1]]} for token in (begin, end) if token}
    return {
        "type": "TemplateProcessing",
        "single": place("A", 0),
        "pair": [*place("A", 0), *place("B", 1)],
        "special_tokens": tokens,
    }


def _name_token(file: GgufFile, key: str) -> tuple[int, str] | None:
    number = _read(file, f"{key}_token_id")
    return None if number is None else (int(number), str(_read(file, "tokens", int(number))))


def _read_rule(file: GgufFile) -> str:
    return str(_read(file, "pre") or _BY_ARCHITECTURE.get(file.architecture, "default"))


def _read(file: GgufFile, key: str, place: int | slice = slice(None)) -> Any:
    """A value of `tokenizer.ggml.`, of a list one entry or all; None where the file has none."""
    field = file.reader.fields.get(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents(place)
