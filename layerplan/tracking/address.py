"""Where a browser finds a run: `python -m layerplan.tracking.address RUNS PORT` lists those of a folder, newest first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from layerplan.redaction import HIDDEN, redact_uri
from layerplan.run_folder import RunFolder
from layerplan.tracking.outbox import TrackingFolder

UI = "http://127.0.0.1:{port}"
UI_PORT = 5000
"""Where `mlflow ui` and `make ui` serve a database unless told otherwise."""
SHOWN = 5
VIEW = "?workflowType=machine_learning"
"""Newer pages of MLflow ask neither the experiment nor its runs what they are: without it they show what GenAI traces have."""


def describe_address(uri: str, run_dir: Path) -> str | None:
    """The address of a run's page, without credentials; of a database, with the command that serves it.

    Args:
        uri: The store's address.
        run_dir: The run's folder.

    Returns:
        None when the store has not taken the run yet, or has no page that is known here.
    """
    place = _find_place(run_dir)
    if place is None:
        return None
    shown = redact_uri(uri)
    if uri.startswith(("http://", "https://")):
        return f"{shown.partition('?')[0].partition('#')[0].replace(f'{HIDDEN}@', '').rstrip('/')}/{place}"
    if uri.startswith("sqlite:"):
        return f"{UI.format(port=UI_PORT)}/{place} when served by: mlflow ui --backend-store-uri {shown}"
    return None


def list_addresses(runs: Path, port: int) -> Iterator[tuple[str, str]]:
    """(run, address) of the runs in the database of a folder that somebody serves at a port, newest first."""
    found = [path.parents[1] for path in runs.glob(f"*/{TrackingFolder(Path()).place}")]
    for run_dir in sorted(found, key=lambda path: TrackingFolder(path).lineage.stat().st_mtime, reverse=True):
        place = _find_place(run_dir)
        if place is not None and _is_in_own_database(run_dir):
            yield run_dir.name, f"{UI.format(port=port)}/{place}"


def find_table(address: str) -> str:
    """The address of the table of all runs, from that of one of them."""
    return address.partition("/runs/")[0] + f"/runs{VIEW}"


def _find_place(run_dir: Path) -> str | None:
    place = _read(TrackingFolder(run_dir).place)
    if not {"experiment_id", "run_id"} <= place.keys():
        return None
    return f"#/experiments/{place['experiment_id']}/runs/{place['run_id']}{VIEW}"


def _is_in_own_database(run_dir: Path) -> bool:
    tracking = _read(RunFolder(run_dir).config).get("tracking", {})
    return isinstance(tracking, dict) and tracking.get("uri") is None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def main(runs: str, port: str) -> None:
    """Prints the table of all runs, and the newest of them."""
    found = list(islice(list_addresses(Path(runs), int(port)), SHOWN))
    if found:
        print(f"{'all runs':<20} {find_table(found[0][1])}")
    for name, address in found:
        print(f"{name:<20} {address}")


if __name__ == "__main__":
    main(*sys.argv[1:])
