"""The texts of `evaluation.held_out` as rows that training workers measure losses on, without an engine or an export.

The labels are those of bits per byte (`eval/held_out_scoring.py`): every token of a document, the first from the beginning-
or end-of-text token, and no end of text, which a document cut by `max_chars` does not have. A document that crosses the end
of a row loses one label there.
"""

from __future__ import annotations

import numpy as np

from eval.encoding import find_first_id, require_tokens
from eval.held_out import read_held_out
from layerplan.config.evaluation import HeldOutConfig
from layerplan.config.run import RunConfig
from layerplan.corpus.encoders import load_encoder
from layerplan.corpus.joining import read_joining
from layerplan.corpus.pack import Packer, RawRow
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.models.ref import ModelRef


def pack_texts(config: RunConfig, model: ModelRef) -> dict[str, PackedRows]:
    """Every held-out text in rows of the corpus's length, tokenized as the corpus is; only the last row has padding.

    Without `corpus.document_mask` a row is read as one text, so that every document begins a row, and may leave padding.

    Raises:
        EvaluationError: When a text has no document or no token, or the tokenizer neither a beginning- nor an end-of-text token.
        CorpusError: When a source cannot be read.
    """
    return {item.name: _pack(item, config, model) for item in config.evaluation.held_out}


def _pack(item: HeldOutConfig, config: RunConfig, model: ModelRef) -> PackedRows:
    corpus, tokenizer = config.corpus, model.tokenizer_file()
    joining = read_joining(corpus, tokenizer)
    encoder = load_encoder(tokenizer.read_text(encoding="utf-8"), corpus.tokenizer_library, corpus.control_tokens)
    documents = [document.text for document in read_held_out(item)]
    require_tokens(model.tokenizer(), documents, item.name)
    first = find_first_id(model.tokenizer(), str(model))
    packer = Packer(corpus.seq_len, joining.end_of_text_id, [first], mark_ends=False)
    rows: list[RawRow] = []
    for ids in encoder.encode(documents):
        rows += packer.add(np.frombuffer(ids, dtype=np.int32))
        if not corpus.document_mask and (rest := packer.finish()) is not None:
            rows.append(rest)
    if (last := packer.finish()) is not None:
        rows.append(last)
    return make_rows(
        np.arange(len(rows), dtype=np.int64),
        np.stack([row.input_ids for row in rows]),
        [row.starts for row in rows],
        np.array([row.used for row in rows], dtype=np.int32),
    )
