"""Bits per byte on held-out text: a third metric, sensitive where small models still guess on multiple choice.

Bits per byte = sum of -log2 p(token) over the UTF-8 bytes of the text, so models with different tokenizers can be
compared. Two models are compared document by document, each weighted with its bytes. `held_out_scoring.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from eval.significance import ALPHA
from layerplan.artifacts import compute_sha256
from layerplan.config.base import StrictModel, describe_fault
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig, HeldOutConfig
from layerplan.corpus.readers import Document
from layerplan.corpus.sources import iter_documents
from layerplan.errors import EvaluationError
from layerplan.intervals import show_difference
from layerplan.plan.estimate import PooledEstimate, estimate_pooled
from layerplan.plan.holm import correct_holm
from layerplan.run_folder import HELD_OUT_NAME

MIN_DOCUMENTS = 10
"""Fewer are not judged: that their differences are about normal cannot be seen, and matters."""


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
    difference_interval: tuple[float, float] | None
    """95 % interval of trained minus base, over documents; None where there is one document or a loss is not finite."""
    adjusted_p: float
    """Two-sided p-value of no difference by the same estimate, Holm-corrected over the texts that are judged; else 1."""
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


def judge_held_out(pairs: Sequence[tuple[HeldOutResult, HeldOutResult]]) -> list[HeldOutVerdict]:
    """Compares (base, trained) on each text, document by document; Holm-corrected over the texts that can be judged.

    Raises:
        EvaluationError: When the documents of a pair differ.
    """
    gaps = [_estimate_gap(base, trained) for base, trained in pairs]
    reasons = [_find_reason(base, trained) for base, trained in pairs]
    adjusted = iter(correct_holm([gap.p_different() for gap, reason in zip(gaps, reasons) if not reason]))
    return [
        _judge_pair(base, trained, gap, 1.0 if reason else next(adjusted), reason)
        for (base, trained), gap, reason in zip(pairs, gaps, reasons)
    ]


def _estimate_gap(base: HeldOutResult, trained: HeldOutResult) -> PooledEstimate:
    """Trained minus base in bits per byte: the mean over documents, weighted with their bytes."""
    if base.text_sha256 != trained.text_sha256:
        raise EvaluationError(
            f"held-out text {trained.name}: base and trained model were scored on different documents"
        )
    losses = np.array([trained.document_nats, base.document_nats])
    if not np.isfinite(losses).all():
        return PooledEstimate(math.nan, ((math.inf, 1.0),))
    bits = (losses[0] - losses[1]) / math.log(2)
    sizes = np.array(base.document_bytes, dtype=float)
    return estimate_pooled((bits / sizes)[None, :], weights_N=sizes)


def _find_reason(base: HeldOutResult, trained: HeldOutResult) -> str:
    """Why a text cannot be judged; empty where it can."""
    for who, result in (("base", base), ("trained model", trained)):
        broken = sum(not math.isfinite(nats) for nats in result.document_nats)
        if broken:
            return f"the {who}'s loss is not finite on {broken} of {len(result.document_nats)} documents"
    num_documents = len(base.document_bytes)
    return f"{num_documents} documents are too few (at least {MIN_DOCUMENTS})" if num_documents < MIN_DOCUMENTS else ""


def _judge_pair(
    base: HeldOutResult, trained: HeldOutResult, estimate: PooledEstimate, p: float, reason: str
) -> HeldOutVerdict:
    low, high = estimate.interval()
    is_known = math.isfinite(low) and math.isfinite(high)
    gap, num_documents = trained.bits_per_byte - base.bits_per_byte, len(base.document_bytes)
    if reason:
        word, found = f"not judged, as {reason}", f"{gap:+.4f}, " if math.isfinite(gap) else ""
    else:
        better = "better" if gap < 0 else "worse"
        word = f"{better} than the base" if p < ALPHA else "not distinguishable from the base"
        found = f"{show_difference(gap, (low, high), 4)}, p = {p:.3g}, "
    return HeldOutVerdict(
        name=trained.name,
        base=base.bits_per_byte,
        trained=trained.bits_per_byte,
        difference_interval=(low, high) if is_known else None,
        adjusted_p=p,
        sentence=f"{word}: {trained.bits_per_byte:.4f} against {base.bits_per_byte:.4f} bits per byte"
        f" ({found}{num_documents} documents)",
    )
