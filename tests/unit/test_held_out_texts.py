"""The rows a sweep's trials are judged by have the labels that bits per byte of a run are summed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.encoding import encode_prompts
from layerplan.config.run import RunConfig
from layerplan.corpus.rows import PADDING, PackedRows
from layerplan.errors import EvaluationError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.held_out_texts import pack_texts
from tests.tiny_tokenizer import make_bytes, save_tokenizer

END, BEGIN = "<end>", "<begin>"
DOCUMENTS = ("abcdefghijkl", "北", "xyz")


def pack(
    folder: Path, *, begin: str | None = None, end: str | None = END, **corpus: object
) -> tuple[ModelRef, PackedRows]:
    special = {"eos_token": end} if end else {}
    special |= {"bos_token": begin} if begin else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    model = ModelRef(str(save_tokenizer(folder / "model", make_bytes(), control=(END, BEGIN), tokenizer_config=config)))
    lines = "".join(json.dumps({"id": str(place), "text": text}) + "\n" for place, text in enumerate(DOCUMENTS))
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
