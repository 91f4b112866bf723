"""Bits per byte on held-out text: a third metric, sensitive where small models still guess on multiple choice.

Bits per byte = sum of -log2 p(token) over the UTF-8 bytes of the text, so models with different tokenizers can be
compared. Two models are compared document by document, each weighted with its bytes. `held_out_scoring.py` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

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

DOUBT = "the corpus was built while other or no held-out documents were named, and may contain some of these"


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
    config_sha256: str | None = None
    """Hash of the values of its config; None in results of versions that did not look."""
    dtype: str
    """Precision it was computed in; `auto` in results of versions that recorded what was asked for."""
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
    may_be_trained_on: bool = False
    """Whether the corpus was built while other or no held-out documents were named, so that it may contain some of these."""
    sentence: str
    """The verdict in words."""

    def with_doubt(self) -> HeldOutVerdict:
        """The same of documents that the corpus may contain."""
        return self.model_copy(update={"may_be_trained_on": True, "sentence": f"{self.sentence}; {DOUBT}"})


@dataclass(frozen=True)
class TextArms:
    """What is compared on one text: the seeds of one condition beside those of another, or one model beside another."""

    reference: Sequence[HeldOutResult]
    trained: Sequence[HeldOutResult]
    reference_name: str = "the base"
    trained_name: str = "the trained model"


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


def load_held_out(out_dir: Path, names: Sequence[str] | None = None) -> dict[str, HeldOutResult]:
    """Reads the held-out results of a scored model; empty when there is none.

    Args:
        out_dir: Its scores.
        names: Texts that are wanted, in their order; all that are there, by name, when left out.

    Raises:
        EvaluationError: When a file is malformed.
    """
    paths = {path.stem: path for path in sorted((out_dir / HELD_OUT_NAME).glob("*.json"))}
    return {name: _read_result(paths[name]) for name in (paths if names is None else names) if name in paths}


def _read_result(path: Path) -> HeldOutResult:
    try:
        return HeldOutResult.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise EvaluationError(f"{path}: not a held-out result ({describe_fault(error)})") from None
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def is_held_out_scored(config: EvaluationConfig, out_dir: Path) -> bool:
    """Whether every text, as it reads now, was scored in the dtype asked for."""
    stored = load_held_out(out_dir, [item.name for item in config.held_out])
    for item in config.held_out:
        before = stored.get(item.name)
        wanted = (compute_sha256([document.text for document in read_held_out(item)]), config.computed_dtype)
        if before is None or (before.text_sha256, config.read_dtype(before.dtype)) != wanted:
            return False
    return True


def judge_held_out(pairs: Sequence[tuple[HeldOutResult, HeldOutResult]]) -> list[HeldOutVerdict]:
    """Compares (base, trained) on each text, document by document; Holm-corrected over the texts that can be judged.

    Raises:
        EvaluationError: When the documents of a pair differ.
    """
    return judge_arms([TextArms([base], [trained]) for base, trained in pairs])


def judge_arms(comparisons: Sequence[TextArms]) -> list[HeldOutVerdict]:
    """The same of any two conditions, each of one model or of several seeds; the verdict's base is the reference.

    Raises:
        EvaluationError: When the documents of a comparison differ.
    """
    gaps = [_estimate_gap(arms) for arms in comparisons]
    reasons = [_find_reason(arms) for arms in comparisons]
    adjusted = iter(correct_holm([gap.p_different() for gap, reason in zip(gaps, reasons) if not reason]))
    return [
        _judge(arms, gap, 1.0 if reason else next(adjusted), reason)
        for arms, gap, reason in zip(comparisons, gaps, reasons)
    ]


def _estimate_gap(arms: TextArms) -> PooledEstimate:
    """Trained minus reference in bits per byte: the mean over documents, weighted with their bytes, and over seeds."""
    results = [*arms.reference, *arms.trained]
    if len({result.text_sha256 for result in results}) > 1:
        raise EvaluationError(
            f"held-out text {results[-1].name}: base and trained model were scored on different documents"
        )
    theirs, mine = (np.array([each.document_nats for each in side]) for side in (arms.reference, arms.trained))
    if not (np.isfinite(theirs).all() and np.isfinite(mine).all()):
        return PooledEstimate(math.nan, ((math.inf, 1.0),))
    sizes = np.array(results[0].document_bytes, dtype=float)
    if len(theirs) == 1:
        return estimate_pooled((mine - theirs) / math.log(2) / sizes, weights_N=sizes)
    return estimate_pooled(mine / math.log(2) / sizes, weights_N=sizes, minus_SN=theirs / math.log(2) / sizes)


def _find_reason(arms: TextArms) -> str:
    """Why a text cannot be judged; empty where it can."""
    for who, results in ((arms.reference_name, arms.reference), (arms.trained_name, arms.trained)):
        for result in results:
            broken = sum(not math.isfinite(nats) for nats in result.document_nats)
            if broken:
                return f"{who}'s loss is not finite on {broken} of {len(result.document_nats)} documents"
    num_documents = len(arms.reference[0].document_bytes)
    return f"{num_documents} documents are too few (at least {MIN_DOCUMENTS})" if num_documents < MIN_DOCUMENTS else ""


def _judge(arms: TextArms, estimate: PooledEstimate, p: float, reason: str) -> HeldOutVerdict:
    low, high = estimate.interval()
    is_known = math.isfinite(low) and math.isfinite(high)
    base, trained = (fmean(each.bits_per_byte for each in side) for side in (arms.reference, arms.trained))
    gap, num_documents = trained - base, len(arms.reference[0].document_bytes)
    if reason:
        word, found = f"not judged, as {reason}", f"{gap:+.4f}, " if math.isfinite(gap) else ""
    else:
        better = "better than" if gap < 0 else "worse than"
        word = f"{better if p < ALPHA else 'not distinguishable from'} {arms.reference_name}"
        found = f"{show_difference(gap, (low, high), 4)}, p = {p:.3g}, "
    return HeldOutVerdict(
        name=arms.trained[0].name,
        base=base,
        trained=trained,
        difference_interval=(low, high) if is_known else None,
        adjusted_p=p,
        sentence=f"{word}: {trained:.4f} against {base:.4f} bits per byte ({found}{num_documents} documents)",
    )
