"""How commands say what happens on the way: this package's loggers, to standard error, as lines for people or as JSON.

What a command answers goes to standard output and is not logged. A program that imports layerplan decides itself where
records go; the processes that Ray starts for a run are told by the same variables as a command.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import IO

from layerplan.errors import ConfigError

STYLE_VARIABLE, LEVEL_VARIABLE, RANKS_VARIABLE = "LAYERPLAN_LOG", "LAYERPLAN_LOG_LEVEL", "LAYERPLAN_LOG_RANKS"
VALUES = {
    STYLE_VARIABLE: ("text", "json"),
    LEVEL_VARIABLE: ("INFO", "DEBUG", "WARNING", "ERROR"),
    RANKS_VARIABLE: ("first", "all"),
}
"""What each may hold; the first stands where nothing is said."""
PACKAGES = ("layerplan", "eval")
TALKATIVE = ("httpx",)
"""Libraries that log a line per request, which Ray Train's handler of the root logger would show."""
STAGES = {
    "eval": "evaluate",
    "layerplan.checkpoint": "checkpoint",
    "layerplan.corpus": "corpus",
    "layerplan.models": "model",
    "layerplan.pipeline.model_options": "model",
    "layerplan.pipeline.run_folder": "storage",
    "layerplan.pipeline.track_sync": "tracking",
    "layerplan.storage": "storage",
    "layerplan.tracer": "trace",
    "layerplan.tracking": "tracking",
    "layerplan.train": "train",
    "layerplan.train.watchdog": "watch",
    "layerplan.sharing": "queue",
    "layerplan.waiting": "wait",
}
"""Which part of a run speaks, by the logger's name; a record's own `stage` wins."""
WIDTH = 100
"""Columns of printed tables; a job's log is not a terminal whose width could be asked."""
SEVERITIES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


def set_up(style: str | None = None, level: str | None = None) -> None:
    """Sends the records of this package to standard error, here and in the workers that this process asks Ray for.

    Args:
        style: `text` or `json`; the environment's when left out.
        level: The least that is shown; the environment's when left out.

    Raises:
        ConfigError: When the environment names what there is not; records are shown as usual then.
    """
    asked = {STYLE_VARIABLE: style, LEVEL_VARIABLE: level}
    try:
        configure({**os.environ, **{name: value for name, value in asked.items() if value is not None}})
    except ConfigError:
        configure({})
        raise


def set_up_worker() -> None:
    """Does so in a process that Ray began, once; what its environment says wrongly is for the command to report."""
    if _find_handler() is None:
        with suppress(ConfigError):
            configure(os.environ)


@contextmanager
def kept() -> Iterator[None]:
    """Leaves the loggers of this package as they were, for a program that calls several commands."""
    loggers = [logging.getLogger(name) for name in (*PACKAGES, *TALKATIVE)]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def configure(environ: Mapping[str, str]) -> None:
    """Makes the one handler of this process as the variables say; one that is there is replaced.

    Nothing is said a second time by the root logger, where Ray Train has a handler of its own in every worker.

    Raises:
        ConfigError: When a variable holds what there is not.
    """
    handler = _Handler({name: _read(environ, name) for name in VALUES})
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [*(one for one in logger.handlers if not isinstance(one, _Handler)), handler]
        logger.setLevel(handler.settings[LEVEL_VARIABLE])
        logger.propagate = False
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def get_settings() -> dict[str, str]:
    """The variables that make another process say what this one does."""
    handler = _find_handler()
    return {name: values[0] for name, values in VALUES.items()} if handler is None else dict(handler.settings)


def shows_progress() -> bool:
    """Whether this process says what happens on the way to a person."""
    handler = _find_handler()
    settings = None if handler is None else handler.settings
    return settings is not None and settings[STYLE_VARIABLE] == "text" and settings[LEVEL_VARIABLE] in ("INFO", "DEBUG")


def set_rank(rank: int) -> None:
    """Says which training worker this process is: all but the first one are heard only of warnings, unless asked for."""
    handler = _find_handler()
    if handler is not None:
        handler.rank = rank


def find_stage(record: logging.LogRecord) -> str:
    """Which part of a run a record is of; empty for none."""
    stage = getattr(record, "stage", None)
    if stage is not None:
        return str(stage)
    name = record.name
    while name and name not in STAGES:
        name = name.rpartition(".")[0]
    return STAGES.get(name, "")


class TextFormatter(logging.Formatter):
    """`[train] step 5/40  loss ...`; warnings and errors are called so."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        stage, rank = find_stage(record), getattr(record, "rank", 0)
        head = (f"[{stage}] " if stage else "") + (f"rank {rank}: " if rank else "")
        text = head + SEVERITIES.get(record.levelno, "") + record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `stage`, `message`, `logger`; `rank` of a training worker."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as JSON."""
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "stage": find_stage(record) or None,
            "message": record.getMessage(),
            "logger": record.name,
            "rank": getattr(record, "rank", None),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps({key: value for key, value in values.items() if value is not None}, ensure_ascii=False)


class _Handler(logging.StreamHandler[IO[str]]):
    """Writes to what standard error is at the time, which may be redirected, after what was printed before."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        logging.Handler.__init__(self)
        self.settings = settings
        self.rank: int | None = None
        self.setFormatter(JsonFormatter() if settings[STYLE_VARIABLE] == "json" else TextFormatter())

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more, which is no fault of this line
            sys.stdout.flush()
        super().emit(record)

    def filter(self, record: logging.LogRecord) -> bool:
        if self.rank is not None:
            record.rank = self.rank
        heard = not self.rank or self.settings[RANKS_VARIABLE] == "all" or record.levelno >= logging.WARNING
        return heard and bool(super().filter(record))


def _find_handler() -> _Handler | None:
    handlers = logging.getLogger(PACKAGES[0]).handlers
    return next((handler for handler in handlers if isinstance(handler, _Handler)), None)


def _read(environ: Mapping[str, str], name: str) -> str:
    allowed = VALUES[name]
    value = environ.get(name) or allowed[0]
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: must be {' or '.join(allowed)}")
    return value
