"""A run goes on with the base that its files were made with.

A profile, measurements, the trials of a sweep and the base's scores are read back by their names, so a folder whose weights
or config were replaced in between, or a branch of the hub that has moved on, would give a run of two models.
"""

from __future__ import annotations

import json

from layerplan.artifacts import write_json
from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_profile import is_commit
from layerplan.run_folder import BASE, RunFolder

COMMIT = "commit"


def find_noted_commit(folder: RunFolder) -> str | None:
    """The commit of its base on the hub that a run was begun with; None for another kind of base, and before it is known."""
    return _read(folder).get(COMMIT)


def check_same_base(folder: RunFolder, model: ModelRef) -> None:
    """Notes which base the run has, as long as nothing was made with it; later refuses another.

    Args:
        folder: Of the run.
        model: An existing model, of the hub at its commit.

    Raises:
        ModelError: Naming what of it changed.
    """
    now, before = model.hash_files(), _read(folder)
    changed = [what for what, found in now.items() if before.get(what, found) != found]
    if changed and _has_results(folder):
        raise ModelError(
            f"model.name={model}: its {' and '.join(changed)} changed since {folder.root} was begun; restore what was there,"
            " or choose another name (--set name=...)"
        )
    if is_commit(model.revision):
        now[COMMIT] = model.revision
    if now != before:
        write_json(folder.base_files, now)


def _read(folder: RunFolder) -> dict[str, str]:
    """Empty for a run that begins, and for those of versions that did not note it."""
    try:
        return dict(json.loads(folder.base_files.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder.base_files}: cannot be read ({error}); choose another name") from None


def _has_results(folder: RunFolder) -> bool:
    made = (
        folder.self_test,
        folder.profile,
        folder.measured,
        folder.measurements,
        folder.plan,
        folder.samples,
        folder.sweep,
        folder.scores_of(BASE),
    )
    return any(path.exists() for path in made)
