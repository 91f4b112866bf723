"""What every trial of a sweep has in common, and that a sweep which goes on has not changed it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from layerplan.artifacts import write_text
from layerplan.config.sweep import SweepConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import ConfigError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.run_folder import BASE, BOUNDARY_PREFIX, PLAN_NAME, ROW_LOSSES_NAME, SEARCH_NAME, TRIAL_NAME
from layerplan.sweep.objective import Trial
from layerplan.train.held_out_rows import hash_rows, load_losses
from layerplan.train.request import load_result
from layerplan.train.trial_record import TrialRecord

DECIDES = ("max_steps", "equal")
"""Fields that decide a trial's numbers and are not in its name; the space, its search and the scheduler may change."""
CORPUS = "corpus_sha256"
"""Hash of the rows that the trials train on, in the same file."""
EARLIER: dict[str, object] = {"equal": "tokens"}
"""What versions without a field did."""


def check_search(sweep: SweepConfig, folder: Path) -> None:
    """Refuses a sweep whose trials would not be those that are already there.

    Args:
        sweep: What is asked for now.
        folder: The sweep's folder; what a version without `search.json` left is known by its trials.

    Raises:
        ConfigError: Naming each field that changed.
    """
    earlier = _read_search(folder)
    earlier = EARLIER | earlier if earlier else {}
    faults = [
        f"sweep.{name}={now!r}: {folder} has trials with {earlier[name]!r}; choose another name or the earlier value"
        for name in DECIDES
        if name in earlier and (now := getattr(sweep, name)) != earlier[name]
    ]
    if faults:
        raise ConfigError(*faults)


def check_trained_rows(corpus_sha256: str, folder: Path) -> None:
    """Refuses a corpus that trials which ended did not train on: the store at an address may have been built anew.

    Raises:
        ConfigError: When it is another one than they had, as far as that was noted.
    """
    before = _read_search(folder).get(CORPUS, corpus_sha256)
    if before != corpus_sha256 and any(folder.glob(f"{BOUNDARY_PREFIX}*/{TRIAL_NAME}")):
        raise ConfigError(
            f"corpus: {folder} has trials that ended on other rows than the store holds now; choose another name, or bring the"
            " earlier store back"
        )


def check_plans(trials: Iterable[Trial], folder: Path) -> None:
    """Refuses a trial whose name an earlier one has that trained another plan, as those of older versions may.

    Raises:
        ConfigError: Naming the first.
        PlanError: When an earlier plan cannot be read.
    """
    for trial in trials:
        path = folder / trial.point.name / PLAN_NAME
        if path.exists() and not _train_alike(earlier := FreezePlan.load(path), trial.plan):
            raise ConfigError(
                f"sweep.freeze: {path.parent} has a trial with another plan ({earlier.plan_type}, this one is"
                f" {trial.plan.plan_type}); choose another name"
            )


def check_judged_rows(metric: str, texts: Mapping[str, PackedRows], folder: Path, trials: Iterable[Trial]) -> None:
    """Refuses a metric that earlier trials measured on other rows: trials could not be ranked by it.

    Args:
        metric: What is to be low.
        texts: Rows of `evaluation.held_out`, as they are now.
        folder: The sweep's folder.
        trials: The space.

    Raises:
        ConfigError: Naming the first.
        CorpusError: When losses cannot be read.
    """
    if metric not in texts:
        return
    now = hash_rows(texts[metric])
    for name in (BASE, *(trial.point.name for trial in trials)):
        before = load_losses(folder / name / ROW_LOSSES_NAME).get(metric)
        if before is not None and before.rows_sha256 != now:
            raise ConfigError(
                f"sweep.metric={metric!r}: {folder / name} was measured on other rows of this text, of other"
                " documents or by an earlier version; choose another name"
            )


def leave_out_other_rows(record: TrialRecord, texts: Mapping[str, PackedRows], folder: Path) -> TrialRecord:
    """A trial's numbers without its losses on texts that have other rows now, which stand beside no other trial's.

    Args:
        record: The trial.
        texts: Rows of `evaluation.held_out`, as they are now.
        folder: The sweep's folder.

    Raises:
        CorpusError: When losses cannot be read.
    """
    measured = load_losses(folder / record.name / ROW_LOSSES_NAME)
    others = {
        name for name, rows in texts.items() if name in measured and measured[name].rows_sha256 != hash_rows(rows)
    }
    left = {name: loss for name, loss in record.text_losses.items() if name not in others}
    return record.model_copy(update={"text_losses": left})


def _train_alike(one: FreezePlan, other: FreezePlan) -> bool:
    """The predicted costs beside it may be those of another version."""
    fields = (
        "plan_type",
        "trainable_layers",
        "trainable_modules",
        "train_embeddings",
        "train_final_norm",
        "train_lm_head",
        "tied",
    )
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def save_search(sweep: SweepConfig, folder: Path, corpus_sha256: str) -> None:
    """Writes what the trials have in common, before the first of them is trained."""
    values = {name: getattr(sweep, name) for name in DECIDES} | {CORPUS: corpus_sha256}
    write_text(folder / SEARCH_NAME, json.dumps(values) + "\n")


def _read_search(folder: Path) -> dict[str, object]:
    path = folder / SEARCH_NAME
    try:
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found: dict[str, object] = {}
        for plan in sorted(folder.glob(f"{BOUNDARY_PREFIX}*/{PLAN_NAME}")):
            result = load_result(plan.parent)
            found |= {"max_steps": result.final_step} if result is not None else {}
        return found
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"sweep: {folder} cannot be read ({error}); choose another name") from None
