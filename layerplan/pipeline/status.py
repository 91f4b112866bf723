"""How a run is doing, read from its folder alone: who runs it, which stages are there, how far training is and how fast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerplan.artifacts import read_lines
from layerplan.checkpoint.index import list_checkpoints
from layerplan.durations import render_duration
from layerplan.errors import CheckpointError, ConfigError, PlanError
from layerplan.pipeline.lease_files import LeaseFiles
from layerplan.pipeline.run_folder import fetch_run
from layerplan.pipeline.run_lease import STALE_S, Holder
from layerplan.plan.explain import render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.run_folder import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    EXPORT_NAME,
    FAILURE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    PLAN_NAME,
    PROFILE_NAME,
    REPORT_NAME,
    RESULT_NAME,
    SELF_TEST_NAME,
    STORE_NAME,
    STREAM_NAME,
    TRAIN,
    VERDICTS_NAME,
    RunFolder,
    parse_step,
)
from layerplan.storage.working import find_home
from layerplan.train import metrics
from layerplan.train.request import TrainResult, load_result

STAGES = {
    "self-test": (SELF_TEST_NAME,),
    "corpus": (f"{STORE_NAME}/{MANIFEST_NAME}", f"{STORE_NAME}/{STREAM_NAME}"),
    "trace": (PROFILE_NAME,),
    "plan": (PLAN_NAME,),
    "training": (RESULT_NAME,),
    "export": (EXPORT_NAME,),
    "scores": (VERDICTS_NAME,),
    "report": (REPORT_NAME,),
}
"""Stages in their order, by the files of which one says that they are whole."""
AFTER_STEPS = ("training", "export", "scores", "report")
"""Those whose files are of fewer steps where a finished run was given more."""
SHOWN_EVENTS = 3
_BAR_CELLS = 24


@dataclass(frozen=True)
class RunStatus:
    """What a table shows of a run."""

    name: str
    rows: tuple[tuple[str, str], ...]
    """(heading, text), in order."""
    is_running: bool
    """Whether somebody holds the run who gave a sign of life lately."""


def read_status(run: str, now: datetime) -> RunStatus:
    """Reads a run's folder, or its address, of which the few files that matter are fetched.

    Args:
        run: Folder or address.
        now: With its time zone; ages are counted from it.

    Raises:
        ConfigError: When it is no run.
    """
    wanted = [name for names in STAGES.values() for name in names]
    folder = RunFolder(fetch_run(run, CONFIG_NAME, METRICS_NAME, FAILURE_NAME, *wanted).expanduser().resolve())
    if not folder.config.exists():
        raise ConfigError(f"{run}: is no run folder (no {CONFIG_NAME})")
    config = _read_json(folder.config)
    holder = read_holder(folder.root)
    age_s = None if holder is None else (now - datetime.fromisoformat(holder.beat)).total_seconds()
    is_running = age_s is not None and age_s < STALE_S
    train = config.get("train", {})
    lines = [line for line in read_lines(folder.metrics) if line.get("run") == TRAIN]
    result = _read_result(folder)
    is_whole = result is not None and result.final_step >= int(train.get("max_steps", 0))
    state = _describe_state(folder, holder, age_s, is_whole=is_whole)
    rows = [("run", str(find_home(folder.root))), ("state", state)]
    rows += [("stages", _describe_stages(folder, is_running=is_running, is_whole=is_whole)), *_describe_plan(folder)]
    rows += _describe_training(result if is_whole else None, lines, train, now)
    rows += [("checkpoints", text) for text in [_describe_checkpoints(folder)] if text]
    rows += _describe_events(lines, now)
    return RunStatus(str(config.get("name", folder.root.name)), tuple(rows), is_running)


def read_holder(root: Path) -> Holder | None:
    """Who holds the run; None when nobody does, or what is there cannot be read."""
    files = LeaseFiles(find_home(root))
    for owner in files.list_owners():
        try:
            return Holder.model_validate_json(files.read(owner) or "")
        except ValidationError:
            continue
    return None


def _describe_state(folder: RunFolder, holder: Holder | None, age_s: float | None, *, is_whole: bool) -> str:
    if holder is not None and age_s is not None:
        since = f"process {holder.pid} on {holder.host}" + (f" (job {holder.job})" if holder.job else "")
        if age_s < STALE_S:
            return f"waiting in line, {holder.waits_for}; {since}" if holder.waits_for else f"running: {since}"
        return f"no sign of life for {render_duration(age_s)}: {since}; submit the same run name again to continue"
    if folder.report.exists() and is_whole:
        return "finished"
    failure = _read_json(folder.failure) if folder.failure.exists() else None
    if failure is not None:
        error = str(failure.get("error", "")).removesuffix(".")
        return f"failed: {error}; submit the same run name again to continue"
    return "not running; submit the same run name again to continue"


def _describe_stages(folder: RunFolder, *, is_running: bool, is_whole: bool) -> str:
    """Whole ones ✓, the one at work …, those to come ·; one that is passed over has a later one behind it and is left out."""
    done = [
        any((folder.root / name).exists() for name in names) and (is_whole or stage not in AFTER_STEPS)
        for stage, names in STAGES.items()
    ]
    last = max((place for place, is_done in enumerate(done) if is_done), default=-1)
    shown = []
    for place, (stage, is_done) in enumerate(zip(STAGES, done)):
        if is_done or place > last:
            mark = "✓" if is_done else "…" if is_running and place == last + 1 else "·"
            shown.append(f"{stage} {mark}")
    return "  ".join(shown)


def _describe_plan(folder: RunFolder) -> list[tuple[str, str]]:
    try:
        plan = FreezePlan.load(folder.plan) if folder.plan.exists() else None
    except PlanError as error:
        return [("plan", str(error))]
    return [] if plan is None else [("plan", f"{plan.plan_type}: {render_layer_map(plan)}")]


def _describe_training(
    result: TrainResult | None, lines: list[dict[str, Any]], train: Mapping[str, Any], now: datetime
) -> list[tuple[str, str]]:
    values: dict[str, float] = {}
    for line in lines:
        values |= {key: value for key, value in line.items() if "/" in key and isinstance(value, int | float)}
    logged = [line for line in lines if metrics.LOSS in line]
    if not logged:
        return []
    step, end, newest = int(logged[-1]["step"]), int(train.get("max_steps", 0)), logged[-1]
    share = min(1.0, step / max(end, 1))
    filled = round(share * _BAR_CELLS)
    left = render_duration((end - step) * values[metrics.STEP_S]) if metrics.STEP_S in values and step > 1 else "?"
    bar = f"{'█' * filled}{'░' * (_BAR_CELLS - filled)}"
    told = f"{bar} {step:,} of {end:,} steps ({share:.1%})"
    if result is None:
        told += f", {left} left; last heard {render_duration(_age_s(newest, now))} ago"
    rows = [("training", told), ("loss", _describe_loss(logged, values))]
    rows.append(("speed", _describe_speed(values, result)))
    if metrics.WORKERS in values:
        rows.append(("workers", f"{values[metrics.WORKERS]:.0f}"))
    if metrics.SLOWEST_RANK in values:
        behind = f"{values.get(metrics.BEHIND_S, 0.0):.2f} s a step behind the first"
        rows.append(("slowest", f"rank {values[metrics.SLOWEST_RANK]:.0f}, {behind}"))
    memory = f"{values.get(metrics.PEAK_MEMORY_GIB, 0.0):.2f} GiB of a worker at most"
    predicted = values.get(metrics.PREDICTED_MEMORY_GIB)
    rows.append(("memory", memory + (f", {predicted:.2f} predicted" if predicted else "")))
    return rows


def _describe_loss(logged: list[dict[str, Any]], values: Mapping[str, float]) -> str:
    text = f"{logged[0][metrics.LOSS]:.4f} -> {logged[-1][metrics.LOSS]:.4f}"
    validation = values.get(metrics.VALIDATION_LOSS)
    return text if validation is None else f"{text}, held-out rows {validation:.4f}"


def _describe_speed(values: Mapping[str, float], result: TrainResult | None) -> str:
    if result is not None:
        return f"{result.tokens_per_s:,.0f} tokens/s, MFU {result.mfu:.1%} over all steps"
    parts = [
        f"{values.get(metrics.TOKENS_PER_S, 0.0):,.0f} tokens/s",
        f"MFU {values.get(metrics.MFU, 0.0):.1%}",
        f"{values.get(metrics.STEP_S, 0.0):.3g} s a step",
        f"{values.get(metrics.DATA_WAIT_SHARE, 0.0):.1%} of it waiting for rows",
    ]
    if metrics.CHECKPOINT_STALL_S in values:
        parts.append(f"{values[metrics.CHECKPOINT_STALL_S]:.2g} s for the last checkpoint")
    return ", ".join(parts)


def _describe_checkpoints(folder: RunFolder) -> str:
    try:
        found = list_checkpoints(find_home(folder.root / CHECKPOINTS_NAME))
    except OSError:
        return ""
    steps = [parse_step(path.name) for path in found]
    return f"{len(steps)} kept, the newest of step {steps[0]:,}" if steps else ""


def _describe_events(lines: list[dict[str, Any]], now: datetime) -> list[tuple[str, str]]:
    events = [line for line in lines if "event" in line][-SHOWN_EVENTS:]
    return [
        ("event", f"{render_duration(_age_s(line, now))} ago, step {line.get('step')}: {line.get('message', '')}")
        for line in events
    ]


def _read_result(folder: RunFolder) -> TrainResult | None:
    try:
        return load_result(folder.root)
    except CheckpointError:
        return None


def _age_s(line: Mapping[str, Any], now: datetime) -> float:
    return max(0.0, now.timestamp() - float(line.get("time", 0)) / 1000)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no config of a run")
    return values
