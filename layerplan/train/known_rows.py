"""What a run's folder knows of its micro-batches where `train.micro_batch_size` is `auto`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerplan.artifacts import write_json
from layerplan.errors import TrainingError
from layerplan.run_folder import MICRO_BATCH_NAME
from layerplan.storage.mirror import carry_file, fetch_file
from layerplan.train.request import TrainRequest


@dataclass(frozen=True)
class KnownRows:
    """Rows of a micro-batch, and what is known of them."""

    rows: int
    state: Literal["trying", "fits", "next"]
    """A step of it was begun; was done; or it is to be tried next."""

    def save(self, run_dir: Path) -> None:
        """Writes it into the run's folder, and to where the run is kept."""
        write_json(run_dir / MICRO_BATCH_NAME, vars(self))
        carry_file(run_dir / MICRO_BATCH_NAME)


def load_known(run_dir: Path) -> KnownRows | None:
    """What an earlier attempt wrote; None when it wrote nothing.

    Raises:
        TrainingError: When the file cannot be read.
    """
    path = run_dir / MICRO_BATCH_NAME
    fetch_file(path)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rows, state = values["rows"], values["state"]
        if isinstance(rows, int) and rows > 0 and state in ("trying", "fits", "next"):
            return KnownRows(rows, state)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise TrainingError(f"{path}: is no size of a micro-batch; remove it and the size is predicted again")


def find_rows(request: TrainRequest) -> int:
    """Rows of a run's micro-batches; 0 where `auto` came to none yet."""
    if request.config.micro_batch_size != "auto":
        return request.config.micro_batch_size
    known = load_known(request.run_dir)
    return 0 if known is None else known.rows
