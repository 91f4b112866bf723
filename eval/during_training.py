"""Scores of checkpoints: beside a training that goes on, and afterwards for any checkpoint that is still there.

`CheckpointScoring` is Ray Train's validation function: the controller calls it with each due checkpoint in a task of its
own, one at a time, keeps the checkpoint until the task is done, and calls it again after a crash. Training does not
wait. When a score breaks the guardrail, the workers are asked to save and stop, through the same file as by SIGTERM.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eval.artifacts import Results, load_answers, load_results
from eval.runner import evaluate_model, load_finished
from eval.significance import ALPHA, Comparison, Verdict, judge_comparisons
from layerplan.artifacts import write_json
from layerplan.checkpoint.hf_export import export_hf
from layerplan.checkpoint.index import list_checkpoints
from layerplan.checkpoint.layout import read_train_state
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import CheckpointError, EvaluationError
from layerplan.log import set_up_worker
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.ray_session import quiet_engines
from layerplan.run_folder import (
    BASE,
    CHECKPOINTS_NAME,
    GUARDRAIL_NAME,
    SCORING_SUFFIX,
    STATE_NAME,
    RunFolder,
    name_step,
    parse_step,
)
from layerplan.storage.flag import Flag
from layerplan.storage.mirror import carry_file, carry_folder, fetch_folder
from layerplan.storage.paths import StoredPath, remove_tree
from layerplan.storage.working import find_home

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointScoring:
    """What is needed to score a checkpoint of one run, and what Ray Train calls with one."""

    run_dir: Path
    base: ModelRef
    plan: FreezePlan
    config: EvaluationConfig
    final_step: int
    stop_file: Path | Flag
    """Made when the guardrail breaks."""
    export_dtype: Literal["base", "float32"] = "base"

    @property
    def due_steps(self) -> range:
        """Steps scored beside training; the last one is scored by the chain itself."""
        every = self.config.score_every_steps
        return range(0) if every is None else range(every, self.final_step, every)

    def leaving_cores(self) -> CheckpointScoring:
        """The same with one thread per engine, unless the config says how many: training needs the other cores."""
        threads = self.config.num_threads_per_actor or 1
        return replace(self, config=self.config.model_copy(update={"num_threads_per_actor": threads}))

    def __call__(self, checkpoint: Any) -> dict[str, float]:
        """Scores a committed checkpoint and returns its accuracies.

        A checkpoint that cannot be scored does not disturb training: the back-fill after it tries again and then fails.

        Raises:
            TaskCancelledError: When the run was asked to stop. Ray Train then keeps the checkpoint, ends without waiting
                for its scores, and calls again when the run is continued.
        """
        from ray.exceptions import TaskCancelledError

        set_up_worker()
        quiet_engines()
        path = find_home(self.run_dir / CHECKPOINTS_NAME / Path(checkpoint.path).name)

        def check_stop() -> None:
            if self.stop_file.exists():
                raise TaskCancelledError(error_message=f"{path.name}: the run was asked to stop before it was scored")

        check_stop()
        try:
            self.base.fetch()
            fetch_folder(RunFolder(self.run_dir).scores_of(BASE))
            step = int(read_train_state(path)["step"])
            results = score_checkpoint(self.leaving_cores(), step, path, after_batch=check_stop)
            if self.config.guardrail_points is not None:
                self._stop_on_breach(step, results)
        except TaskCancelledError:
            raise
        except Exception as error:
            logger.warning("%s: not scored beside training: %s", path.name, error)
            return {}
        return {f"eval/{key}/accuracy": result.question_mean for key, result in results.items()}

    def _stop_on_breach(self, step: int, results: Results) -> None:
        assert self.config.guardrail_points is not None
        verdicts = compare_with_base(RunFolder(self.run_dir).evaluation, name_step(step), results)
        breach = find_breach(verdicts, self.config.guardrail_points, num_looks=len(self.due_steps))
        if breach is not None:
            found = {"step": step, "verdict": breach.model_dump(mode="json")}
            write_json(self.run_dir / GUARDRAIL_NAME, found)
            carry_file(self.run_dir / GUARDRAIL_NAME)
            logger.info("guardrail: %s Training stops", breach.sentence)
            self.stop_file.touch()


def score_checkpoint(
    scoring: CheckpointScoring, step: int, checkpoint: StoredPath, *, after_batch: Callable[[], None] = lambda: None
) -> Results:
    """Exports one checkpoint and scores it into `evaluation/<step>`; what was scored before is read back.

    An export made here is removed again, if need be by the attempt after a kill; one that was there stays.

    Raises:
        CheckpointError: When the checkpoint is incomplete.
        EvaluationError: When it cannot be scored.
    """
    label = name_step(step)
    finished = find_scores(scoring, step)
    if finished is not None:
        return finished
    if not (checkpoint / STATE_NAME).exists():
        raise CheckpointError(f"{checkpoint}: no {STATE_NAME}; the checkpoint is incomplete")
    run = RunFolder(scoring.run_dir)
    out_dir, exported = run.scores_of(label), run.export_of(label)
    marker = exported.with_name(label + SCORING_SUFFIX)
    is_kept = exported.exists() and not marker.exists()
    if not is_kept:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        export_hf(
            base=scoring.base,
            checkpoint=checkpoint,
            out_dir=exported,
            plan=scoring.plan,
            export_dtype=scoring.export_dtype,
        )
        _share(exported, marker)
    try:
        results = evaluate_model(
            scoring.base.at(exported),
            scoring.config,
            out_dir,
            report=lambda line: logger.info("%s: %s", label, line),
            after_batch=after_batch,
        )
        carry_folder(out_dir)
        return results
    finally:
        if not is_kept:
            for path in {exported, find_home(exported)}:
                remove_tree(path)
            for each in {marker, find_home(marker)}:
                each.unlink(missing_ok=True)


def _share(exported: Path, marker: Path) -> None:
    """Sends an export to where engines on other nodes find it; where there is one node, that would be for nothing."""
    import ray

    if ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1:
        carry_file(marker)
        carry_folder(exported)


def find_scores(scoring: CheckpointScoring, step: int) -> Results | None:
    """The scores of a step under this config, or None when they are not whole."""
    run, label = RunFolder(scoring.run_dir), name_step(step)
    return load_finished(scoring.base.at(run.export_of(label)), scoring.config, run.scores_of(label))


def find_checkpoints(run_dir: Path) -> dict[int, StoredPath]:
    """Complete checkpoints of a run by step."""
    found = reversed(list_checkpoints(find_home(run_dir / CHECKPOINTS_NAME)))
    return {step: path for path in found if (step := parse_step(path.name)) is not None}


def backfill(scoring: CheckpointScoring, steps: Iterable[int]) -> tuple[dict[int, Results], list[int]]:
    """Scores checkpoints that are still there and were not scored yet.

    Returns:
        The results by step, and the steps that have neither scores nor a complete checkpoint.
    """
    there = find_checkpoints(scoring.run_dir)
    scored: dict[int, Results] = {}
    gone: list[int] = []
    for step in steps:
        found = find_scores(scoring, step)
        if found is None and step in there:
            found = score_checkpoint(scoring, step, there[step])
        if found is None:
            gone.append(step)
        else:
            scored[step] = found
    return scored, gone


def compare_with_base(evaluation: Path, label: str, results: Results, *, name: str | None = None) -> list[Verdict]:
    """Verdicts of one scored checkpoint, by this name, against the untouched base, Holm-corrected over all of them.

    Raises:
        EvaluationError: When the base was not scored under the same protocols.
    """
    base = load_results(evaluation / BASE)
    comparisons: list[Comparison] = []
    for key, result in results.items():
        if key not in base:
            raise EvaluationError(f"{evaluation / BASE}: has no {key}; the base must be scored first")
        mine, theirs = (load_answers(evaluation / name, result.benchmark, result.protocol) for name in (label, BASE))
        comparisons.append(([("the base", base[key], theirs)], [(name or label, result, mine)]))
    return judge_comparisons(comparisons)


def find_breach(verdicts: Iterable[Verdict], points: float, *, num_looks: int) -> Verdict | None:
    """The worst verdict that lies at least `points` below the base and is significantly below it, or None.

    A run is looked at after every scored checkpoint, so each look gets an equal part of the error (Bonferroni).
    """
    level = ALPHA / max(1, num_looks)
    broken = [item for item in verdicts if item.difference <= -points and item.adjusted_p < level]
    return min(broken, key=lambda item: item.difference, default=None)


def read_breach(run_dir: Path, points: float) -> str | None:
    """The sentence of a breach that the given guardrail still calls one, or None.

    Raises:
        EvaluationError: When the file is not readable.
    """
    path = run_dir / GUARDRAIL_NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        verdict, step = Verdict.model_validate(found["verdict"]), int(found["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return f"step {step}: {verdict.sentence}" if verdict.difference <= -points else None
