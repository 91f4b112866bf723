"""Sends what a run folder holds for its tracking store and what has not arrived there.

It goes on where the run stopped and sends nothing twice. The address is the one of the run's config; credentials were not
written there, so an address that has any is given again.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from pydantic import ValidationError

from layerplan.config.tracking import TrackingConfig
from layerplan.errors import ConfigError, TrackingError
from layerplan.redaction import find_hidden
from layerplan.run_folder import RunFolder
from layerplan.tracking.background import BackgroundSender, locate_store
from layerplan.tracking.outbox import TrackingFolder
from layerplan.tracking.position import count_backlog

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""With a store that neither takes anything nor fails; somebody is watching."""


def sync(run_dir: Path, uri: str | None) -> None:
    """Sends until everything has arrived.

    Raises:
        ConfigError: When the folder is no tracked run, or the address lacks its credentials.
        TrackingError: When something has not arrived.
    """
    config = read_tracking(run_dir, uri)
    logger.info("to send: %s", count_backlog(run_dir).describe() or "nothing")
    sender = BackgroundSender(
        locate_store(config, run_dir),
        config.experiment,
        TrackingFolder(run_dir),
        logger.info,
    )
    sender.start()
    sender.close(stalled_s=PATIENCE_S, in_all_s=math.inf)
    if not count_backlog(run_dir).is_empty:
        raise TrackingError(f"{run_dir}: not everything has arrived; run the same command again")
    print("[tracking] everything has arrived")


def read_tracking(run_dir: Path, uri: str | None) -> TrackingConfig:
    """The tracking section of the run's config, with another address if one is given."""
    if not TrackingFolder(run_dir).lineage.exists():
        raise ConfigError(
            f"RUN={run_dir}: holds nothing for a tracking store; the folder of a run with tracking is expected"
        )
    path = RunFolder(run_dir).config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["tracking"]
        config = TrackingConfig.model_validate({**values, **({} if uri is None else {"uri": uri})})
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(f"{path}: cannot be read; the run's own file is expected") from None
    if list(find_hidden(config.uri)):
        raise ConfigError(f"{path}: tracking.uri={config.uri} is kept without its credentials; give it with --uri")
    return config
