"""How a run that lost a part of its cluster says so: what was lost, and from where the same command goes on."""

from __future__ import annotations

from pathlib import Path

import ray

from layerplan.checkpoint.index import list_checkpoints
from layerplan.errors import TrainingError, first_line
from layerplan.run_folder import CHECKPOINTS_NAME, parse_step
from layerplan.storage.working import find_home

AGAIN = "submit the same command again to continue"


def find_loss(error: BaseException) -> BaseException | None:
    """Ray's own report of a process, node or object that is gone, inside an exception; None for any other fault."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ray.exceptions.RayError) and not isinstance(current, ray.exceptions.RayTaskError):
            return current
        failures = getattr(current, "worker_failures", None) or {}
        inner = [getattr(current, name, None) for name in ("cause", "health_check_failure")]
        pending = [*failures.values(), *inner, current.__cause__, current.__context__, *pending]
    return None


def describe_next(run_dir: Path) -> str:
    """That the same command continues, and from which step; the folders of the checkpoints are asked."""
    finished = list_checkpoints(find_home(run_dir / CHECKPOINTS_NAME))
    if not finished:
        return f"{AGAIN}; no checkpoint was finished yet, so training begins at step 0"
    return f"{AGAIN} from step {parse_step(finished[0].name)} ({finished[0]})"


def explain_loss(error: BaseException, run_dir: Path, max_failures: int) -> TrainingError | None:
    """The end of a training by a loss, as one line; None when nothing was lost."""
    loss = find_loss(error)
    if loss is None:
        return None
    failures = getattr(error, "worker_failures", None) or {}
    lost = [rank for rank, failure in sorted(failures.items()) if find_loss(failure) is not None]
    if lost:
        what = f"rank {lost[0]} once more than train.max_failures={max_failures} allows"
    else:
        what = "the controller of Ray Train, or the cluster"
    return TrainingError(f"training lost {what} ({describe_loss(loss)}); {describe_next(run_dir)}")


def describe_loss(loss: BaseException) -> str:
    """Ray's reason in one line: of its many, the one that names a cause."""
    lines = [line.strip() for line in str(loss).splitlines() if line.strip()]
    reason = next((line for line in lines if "died" in line or "dead" in line or "lost" in line), first_line(loss))
    return f"{type(loss).__name__}: {reason[:300]}"
