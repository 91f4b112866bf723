"""The rows a sweep's trials are judged by have the labels that bits per byte of a run are summed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from eval.encoding import encode_prompts
from eval.held_out_scoring import score_held_out
from eval.runner import evaluate_model
from layerplan.config.evaluation import EvaluationConfig
from layerplan.config.run import RunConfig
from layerplan.corpus.rows import PADDING, PackedRows
from layerplan.errors import EvaluationError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.held_out_texts import pack_texts
from tests.model_folders import edit_config, save_tiny_base
from tests.tiny_tokenizer import make_bytes, save_tokenizer

END, BEGIN = "<end>", "<begin>"
DOCUMENTS = ("abcdefghijkl", "北", "xyz")


def pack(
    folder: Path,
    *,
    begin: str | None = None,
    end: str | None = END,
    tokenizer: Tokenizer | None = None,
    documents: tuple[str, ...] = DOCUMENTS,
    **corpus: object,
) -> tuple[ModelRef, PackedRows]:
    special = {"eos_token": end} if end else {}
    special |= {"bos_token": begin} if begin else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    model = ModelRef(
        str(save_tokenizer(folder / "model", tokenizer or make_bytes(), control=(END, BEGIN), tokenizer_config=config))
    )
    lines = "".join(json.dumps({"id": str(place), "text": text}) + "\n" for place, text in enumerate(documents))
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    held_out = [{"name": "notes", "source": {"path": str(folder / "text.jsonl")}, "max_chars": 10}]
    values = {
        "name": "sweep",
        "model": {"type": "pretrained", "name": model.name},
        "corpus": {"sources": [{"path": str(folder / "text.jsonl")}], "end_of_text": END, **corpus},
        "evaluation": {"benchmarks": [{"name": "ceval", "path": "builtin"}], "held_out": held_out},
    }
    return model, pack_texts(RunConfig.model_validate(values), model)["notes"]


def list_pieces(rows: PackedRows) -> list[list[int]]:
    """Ids of each document in each row; all but the first are labels."""
    return [
        ids[documents == number].tolist()
        for ids, documents in zip(rows.input_ids, rows.document_ids)
        for number in range(documents.max() + 1)
    ]


@pytest.mark.parametrize("begin", [None, BEGIN])
def test_every_token_of_a_cut_document_is_a_label_and_no_end_of_text(tmp_path: Path, begin: str | None) -> None:
    model, rows = pack(tmp_path, begin=begin, seq_len=32)
    tokenizer = model.tokenizer()
    first = tokenizer.convert_tokens_to_ids(begin or END)
    encoded = encode_prompts(tokenizer, [text[:10] for text in DOCUMENTS], add_special_tokens=False)
    assert list(map(len, encoded)) == [10, 3, 3]
    assert list_pieces(rows) == [[first, *ids] for ids in encoded]
    assert (rows.document_ids[0] == PADDING).sum() == 32 - (11 + 4 + 4)


def test_a_document_that_crosses_a_row_loses_one_label(tmp_path: Path) -> None:
    _, rows = pack(tmp_path, seq_len=16)
    assert list(map(len, list_pieces(rows))) == [11, 4, 1, 3]


def test_without_a_document_mask_every_document_has_rows_of_its_own(tmp_path: Path) -> None:
    _, rows = pack(tmp_path, seq_len=16, document_mask=False)
    assert list(map(len, list_pieces(rows))) == [11, 4, 4]
    assert (rows.document_ids != PADDING).sum(axis=1).tolist() == [11, 4, 4]


def test_a_tokenizer_without_a_first_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="neither a beginning nor an end-of-text token"):
        pack(tmp_path, end=None, seq_len=16)


@pytest.mark.parametrize("scores", [evaluate_model, score_held_out])
def test_a_text_that_gives_no_token_is_named_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: Callable[..., object]
) -> None:
    """A tokenizer that strips makes nothing of spaces; a text with such a document among others is scored."""
    base = save_tiny_base(tmp_path / "base", vocab_size=300)
    edit_config(base, max_position_embeddings=1024)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    save_tokenizer(base, strip_spaces(make_bytes()), control=(END, BEGIN), tokenizer_config=special)
    for name, texts in (("spaces", ["  \n "]), ("some", ["   ", "tides"])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr("eval.pool.map_over_actors", refuse_to_ask)
    monkeypatch.setattr("eval.held_out_scoring.map_over_actors", refuse_to_ask)

    def score(*names: str) -> None:
        held_out = [{"name": name, "source": {"path": str(tmp_path / f"{name}.jsonl")}} for name in names]
        benchmarks = [{"name": "ceval", "path": "builtin", "max_questions": 1}]
        values = {"backend": "transformers", "benchmarks": benchmarks, "held_out": held_out}
        scores(ModelRef(str(base)), EvaluationConfig.model_validate(values), tmp_path / "out")

    with pytest.raises(
        EvaluationError, match=r"held_out: spaces: the model's tokenizer makes no token of any of its 1 d"
    ):
        score("some", "spaces")
    with pytest.raises(AskedError):
        score("some")


def test_a_text_that_gives_no_token_judges_no_trial(tmp_path: Path) -> None:
    with pytest.raises(
        EvaluationError, match="held_out: notes: the model's tokenizer makes no token of any of its 2 d"
    ):
        pack(tmp_path, seq_len=16, tokenizer=strip_spaces(make_bytes()), documents=(" ", "  "))


class AskedError(Exception):
    """Raised in place of an engine's answers."""


def refuse_to_ask(*args: object, **kwargs: object) -> object:
    raise AskedError


def strip_spaces(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer
