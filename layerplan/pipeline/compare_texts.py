"""Held-out texts over finished runs: every run against its own base, then against every run before it.

Two runs are compared where both were scored on the very same documents, document by document as a run is with its base.
Everything is one family of Holm's correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from pydantic import Field

from eval.held_out import DOUBT, HeldOutResult, HeldOutVerdict, TextArms, judge_arms, load_held_out
from layerplan.config.base import StrictModel
from layerplan.pipeline.compare_names import find_trained_scores, list_texts, name_runs, read_evaluation
from layerplan.report.answers import read_answers
from layerplan.run_folder import BASE, RunFolder

ITS_BASE = "its base"


class TextComparison(StrictModel):
    """One run, or the seeds of one condition, beside another on one held-out text."""

    text: str
    """Name of the text."""
    run: str
    """What is judged: a run, or the first of the seeds of an arm."""
    reference: str
    """What it is compared with: `its base`, or another run."""
    num_documents: int = Field(ge=1)
    """Documents both were scored on."""
    num_seeds: int = Field(default=1, ge=1)
    """Runs of the judged condition pooled into this comparison."""
    num_reference_seeds: int = Field(default=1, ge=1)
    """Runs of the reference condition."""
    reference_bits_per_byte: float
    """Of the reference, mean over its seeds."""
    bits_per_byte: float
    """Of the run, mean over its seeds."""
    difference_interval: tuple[float, float] | None
    """95 % interval of run minus reference, over documents and seeds; None where it is not known."""
    adjusted_p: float
    """Two-sided p-value of no difference, Holm-corrected over all comparisons of texts made together; 1 where not judged."""
    sentence: str
    """The verdict in words."""

    @property
    def line(self) -> str:
        """The verdict with what it is on."""
        return f"{self.run} against {self.reference}, {self.text}: {self.sentence}"


def judge_texts(
    runs: Sequence[Path], names: Mapping[Path, str] | None = None, *, arms: Sequence[Sequence[Path]] | None = None
) -> list[TextComparison]:
    """Every run against its own base, then arms against each other, on each text that both were scored on.

    Args:
        runs: Folders of finished runs.
        names: What each is called; by its folder where that tells them apart, when left out.
        arms: Runs that are compared as one, since they differ in the seed alone; every run by itself when left out.

    Raises:
        EvaluationError: When a run has not finished, or a base and its run were scored on different documents.
    """
    names = names or name_runs(runs)
    trained = {run: load_asked(run, find_trained_scores(run)) for run in runs}
    compared: list[tuple[str, str, TextArms]] = []
    for run in runs:
        base = load_asked(run, RunFolder(run).scores_of(BASE))
        pairs = [(base[text], result) for text, result in trained[run].items() if text in base]
        compared += [(names[run], ITS_BASE, TextArms([before], [after])) for before, after in pairs]
    for text in dict.fromkeys(text for results in trained.values() for text in results):
        named = [(names[arm[0]], _collect(arm, text, trained)) for arm in arms or [[run] for run in runs]]
        scored = [(name, results) for name, results in named if results]
        compared += [
            (name, reference, TextArms(theirs, mine, reference, name))
            for (reference, theirs), (name, mine) in combinations(scored, 2)
            if theirs[0].text_sha256 == mine[0].text_sha256
        ]
    verdicts = judge_arms([both for _, _, both in compared])
    return [_describe(*each, verdict) for each, verdict in zip(compared, verdicts, strict=True)]


def list_other_documents(runs: Sequence[Path], names: Mapping[Path, str]) -> list[str]:
    """A warning for each name that stands for different texts in different runs."""
    hashes: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for text, result in load_asked(run, find_trained_scores(run)).items():
            hashes.setdefault(text, {}).setdefault(result.text_sha256, []).append(names[run])
    return [
        f"{text}: {' and '.join(', '.join(group) for group in by_hash.values())} were scored on different documents under this"
        " name; their bits per byte are not comparable with each other."
        for text, by_hash in hashes.items()
        if len(by_hash) > 1
    ]


def list_doubts(runs: Sequence[Path], names: Mapping[Path, str]) -> list[str]:
    """A warning for each run whose corpus may contain documents that it is measured on, as its own verdicts say."""
    lines = []
    for run in runs:
        doubted = [text.name for text in read_answers(run).held_out if text.may_be_trained_on]
        lines += [f"{names[run]}, {' and '.join(doubted)}: {DOUBT}"] if doubted else []
    return lines


def load_asked(run: Path, scores: Path) -> dict[str, HeldOutResult]:
    """Results on the texts that a run's config asks for, in its order; on all where it has no config that can be read.

    What was asked for once and is no more may lie there still.
    """
    evaluation = read_evaluation(run)
    return load_held_out(scores, list_texts(evaluation) if evaluation else None)


def _collect(
    arm: Sequence[Path], text: str, trained: Mapping[Path, Mapping[str, HeldOutResult]]
) -> list[HeldOutResult]:
    """The results of an arm's seeds on a text; none unless all of them have read the same documents."""
    found = [trained[run][text] for run in arm if text in trained[run]]
    is_whole = len(found) == len(arm) and len({result.text_sha256 for result in found}) == 1
    return found if is_whole else []


def _describe(run: str, reference: str, arms: TextArms, verdict: HeldOutVerdict) -> TextComparison:
    return TextComparison(
        text=verdict.name,
        run=run,
        reference=reference,
        num_documents=len(arms.trained[0].document_bytes),
        num_seeds=len(arms.trained),
        num_reference_seeds=len(arms.reference),
        reference_bits_per_byte=verdict.base,
        bits_per_byte=verdict.trained,
        difference_interval=verdict.difference_interval,
        adjusted_p=verdict.adjusted_p,
        sentence=verdict.sentence,
    )
