"""What every trial of a sweep has in common, and that a sweep which goes on has not changed it."""

from __future__ import annotations

import json
from pathlib import Path

from layerplan.artifacts import write_text
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError
from layerplan.run_folder import BOUNDARY_PREFIX, PLAN_NAME, SEARCH_NAME
from layerplan.train.request import load_result

DECIDES = ("freeze", "max_steps")
"""Fields that decide a trial's numbers; which boundaries are tried, how many at once and by which scheduler may change."""


def check_search(sweep: SweepConfig, folder: Path) -> None:
    """Refuses a sweep whose trials would not be those that are already there.

    Args:
        sweep: What is asked for now.
        folder: The sweep's folder; what a version without `search.json` left is known by its trials.

    Raises:
        ConfigError: Naming each field that changed.
    """
    earlier = _read_search(folder)
    faults = [
        f"sweep.{name}={now!r}: {folder} has trials with {earlier[name]!r}; choose another name or the earlier value"
        for name in DECIDES
        if name in earlier and (now := getattr(sweep, name)) != earlier[name]
    ]
    if faults:
        raise ConfigError(*faults)


def save_search(sweep: SweepConfig, folder: Path) -> None:
    """Writes what the trials have in common, before the first of them is trained."""
    write_text(folder / SEARCH_NAME, json.dumps({name: getattr(sweep, name) for name in DECIDES}) + "\n")


def _read_search(folder: Path) -> dict[str, object]:
    path = folder / SEARCH_NAME
    try:
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found: dict[str, object] = {}
        for plan in sorted(folder.glob(f"{BOUNDARY_PREFIX}*/{PLAN_NAME}")):
            found["freeze"] = json.loads(plan.read_text(encoding="utf-8"))["plan_type"].removeprefix("freeze_")
            result = load_result(plan.parent)
            found |= {"max_steps": result.final_step} if result is not None else {}
        return found
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"sweep: {folder} cannot be read ({error}); choose another name") from None
