"""Bits per byte on held-out text: a third metric, sensitive where small models still guess on multiple choice.

Bits per byte = sum of -log2 p(token) over the UTF-8 bytes of the text, so models with different tokenizers can be
compared. Two models are compared by a bootstrap over documents. `held_out_scoring.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from eval.resampling import BOOTSTRAP_SAMPLES
from eval.significance import ALPHA, correct_holm
from layerplan.artifacts import compute_sha256
from layerplan.config.base import StrictModel, describe_fault
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig, HeldOutConfig
from layerplan.corpus.readers import Document
from layerplan.corpus.sources import iter_documents
from layerplan.errors import EvaluationError
from layerplan.intervals import show_difference
from layerplan.run_folder import HELD_OUT_NAME

MIN_DOCUMENTS = 10
"""Fewer cannot be resampled: the bootstrap of one document has no spread at all."""


class HeldOutResult(StrictModel):
    """One model on one text."""

    name: str
    """Name of the text."""
    text_sha256: str
    """Hash of the documents; results of other texts cannot be compared."""
    model: str
    """Folder name or hub id."""
    weights_sha256: str | None
    """Hash of a folder's weight files."""
    dtype: str
    """Precision asked for."""
    window: int
    """Tokens a prediction can look back, at most."""
    bits_per_byte: float
    """Over all documents."""
    num_tokens: int = Field(ge=1)
    """Tokens predicted."""
    num_control_tokens: int = 0
    """Control tokens that the documents spell out; they are text."""
    document_nats: list[float]
    """Negative log-likelihood of each document, natural log."""
    document_bytes: list[int]
    """UTF-8 bytes of each document."""


class HeldOutVerdict(StrictModel):
    """One model's bits per byte against the base's."""

    name: str
    """Name of the text."""
    base: float
    """Bits per byte of the base."""
    trained: float
    """Bits per byte of the trained model."""
    difference_interval: tuple[float, float]
    """95 % bootstrap interval of trained minus base, over documents."""
    adjusted_p: float
    """Two-sided bootstrap p-value of no difference, Holm-corrected over the texts."""
    sentence: str
    """The verdict in words."""


def read_held_out(item: HeldOutConfig) -> list[Document]:
    """The documents of a held-out text, each cut to `max_chars`, those without text left out.

    Raises:
        EvaluationError: When there is none.
        CorpusError: When the source cannot be read.
    """
    read = iter_documents(CorpusConfig(sources=[item.source]), field=name_source(item))
    whole = (document for document in read if document.text)
    documents = [replace(document, text=document.text[: item.max_chars]) for document in whole]
    if not documents:
        raise EvaluationError(f"evaluation.held_out: {item.name}: {item.source.path} holds no document")
    return documents


def name_source(item: HeldOutConfig) -> str:
    """What a message calls the source of a held-out text."""
    return f"evaluation.held_out ({item.name}).source"


def load_held_out(out_dir: Path, order: Sequence[str] = ()) -> dict[str, HeldOutResult]:
    """Reads the held-out results of a scored model; empty when there is none.

    Args:
        out_dir: Its scores.
        order: Names of texts that come first, in this order; the others follow by name.

    Raises:
        EvaluationError: When a file is malformed.
    """
    found = {}
    for path in sorted((out_dir / HELD_OUT_NAME).glob("*.json")):
        try:
            found[path.stem] = HeldOutResult.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise EvaluationError(f"{path}: not a held-out result ({describe_fault(error)})") from None
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    first = [name for name in order if name in found]
    return {name: found[name] for name in dict.fromkeys([*first, *found])}


def is_held_out_scored(config: EvaluationConfig, out_dir: Path) -> bool:
    """Whether every text, as it reads now, was scored in the dtype asked for."""
    stored = load_held_out(out_dir)
    for item in config.held_out:
        before = stored.get(item.name)
        wanted = (compute_sha256([document.text for document in read_held_out(item)]), config.dtype)
        if before is None or (before.text_sha256, before.dtype) != wanted:
            return False
    return True


def judge_held_out(pairs: Sequence[tuple[HeldOutResult, HeldOutResult]], *, seed: int = 0) -> list[HeldOutVerdict]:
    """Compares (base, trained) on each text by a paired bootstrap over its documents; Holm-corrected over the texts.

    Raises:
        EvaluationError: When the documents of a pair differ.
    """
    gaps = [_bootstrap_gaps(base, trained, seed) for base, trained in pairs]
    adjusted = correct_holm([_two_sided(found) for found in gaps])
    return [_judge_pair(base, trained, found, p) for (base, trained), found, p in zip(pairs, gaps, adjusted)]


def _bootstrap_gaps(base: HeldOutResult, trained: HeldOutResult, seed: int) -> np.ndarray:
    """Trained minus base in bits per byte, over resampled documents."""
    if base.text_sha256 != trained.text_sha256:
        raise EvaluationError(
            f"held-out text {trained.name}: base and trained model were scored on different documents"
        )
    bits = (np.array(trained.document_nats) - np.array(base.document_nats)) / math.log(2)
    sizes = np.array(base.document_bytes, dtype=float)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(sizes), size=len(sizes)) for _ in range(BOOTSTRAP_SAMPLES))
    return np.array([bits[drawn].sum() / sizes[drawn].sum() for drawn in draws])


def _two_sided(gaps: np.ndarray) -> float:
    """Bootstrap p-value of no difference; the observed sample counts as one, so it is never 0."""
    sides = [(1 + (side <= 0).sum()) / (1 + len(gaps)) for side in (gaps, -gaps)]
    return float(min(1.0, 2 * min(sides)))


def _judge_pair(base: HeldOutResult, trained: HeldOutResult, gaps: np.ndarray, p: float) -> HeldOutVerdict:
    low, high = (float(value) for value in np.quantile(gaps, [0.025, 0.975]))
    gap, num_documents = trained.bits_per_byte - base.bits_per_byte, len(base.document_bytes)
    if num_documents < MIN_DOCUMENTS:
        word = f"not judged, as {num_documents} documents are too few to resample (at least {MIN_DOCUMENTS})"
    elif p < ALPHA:
        word = f"{'better' if gap < 0 else 'worse'} than the base"
    else:
        word = "not distinguishable from the base"
    return HeldOutVerdict(
        name=trained.name,
        base=base.bits_per_byte,
        trained=trained.bits_per_byte,
        difference_interval=(low, high),
        adjusted_p=p,
        sentence=f"{word}: {trained.bits_per_byte:.4f} against {base.bits_per_byte:.4f} bits per byte"
        f" ({show_difference(gap, (low, high), 4)}, p = {p:.3g}, {num_documents} documents)",
    )
