"""What every command shares: arguments, exit codes, and errors as one clear line.

Exit codes: 0 done, 1 a fault while running, 2 a bad config, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from layerplan.config.load import apply_overrides, load_config, validate_config
from layerplan.config.run import RunConfig
from layerplan.engine_noise import calm_engines
from layerplan.errors import ConfigError, LayerplanError, find_layerplan_error
from layerplan.log import kept, set_up
from layerplan.redaction import redact_text
from layerplan.telemetry import disable_bars_in_logs, disable_telemetry

logger = logging.getLogger(__name__)


def add_config_arguments(parser: argparse.ArgumentParser, *, takes_model: bool = False) -> None:
    """Adds what commands with a config have.

    Args:
        parser: The command's.
        takes_model: Whether a model alone is enough, with the defaults of every field.
    """
    if takes_model:
        parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id; the config's when left out")
    parser.add_argument(
        "--config", required=not takes_model, metavar="FILE", help="YAML config or a resolved_config.json"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one field; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; load no weights, take no GPU")


def read_config(args: argparse.Namespace) -> RunConfig:
    """The config of a command line; without a file, the defaults for its model in a run named after it.

    Raises:
        ConfigError: With one line per fault.
    """
    if args.config:
        return load_config(args.config, args.set)
    if not args.model:
        raise ConfigError("MODEL: a folder or hub id is required, or --config FILE")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(args.model).name).strip("-._") or "model"
    values = {"name": name[:100], "model": {"type": "pretrained", "name": args.model}}
    return validate_config(apply_overrides(values, args.set))


def read_config_or_model(args: argparse.Namespace) -> RunConfig:
    """As `read_config`, for commands that take a config or a model and not both.

    Raises:
        ConfigError: When both are given, too.
    """
    if args.config and args.model:
        raise ConfigError("MODEL: not beside --config, which names the model; use --set model.name=MODEL")
    return read_config(args)


def run_guarded(work: Callable[[], None], *, style: str | None = None, level: str | None = None) -> int:
    """Runs the work with telemetry off and turns every ending into an exit code and at most one line per fault.

    Args:
        work: The command.
        style: `text` or `json`, how records are shown; the environment's when left out.
        level: The least that is shown; the environment's when left out.
    """
    disable_telemetry()
    disable_bars_in_logs()
    _print_what_can_be_printed()
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    with kept():
        return _run(work, style, level)


def _run(work: Callable[[], None], style: str | None, level: str | None) -> int:
    try:
        set_up(style, level)
        with calm_engines():
            work()
    except KeyboardInterrupt:
        logger.info("stopped by the user; submit the same run name again to continue")
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _report(error)
    return 0


def _print_what_can_be_printed() -> None:
    """Has characters that a terminal's encoding lacks shown by their numbers, as Python does for errors; no print fails."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _stop_on_sigterm(signum: int, frame: FrameType | None) -> None:
    logger.info("stopped by SIGTERM; submit the same run name again to continue")
    raise SystemExit(143)


def _report_fault(error: LayerplanError) -> int:
    faults = error.faults if isinstance(error, ConfigError) else (str(error),)
    for fault in faults:
        logger.error("%s", redact_text(fault))
    return error.exit_code


def _report(error: Exception) -> int:
    """A fault of ours, or one line for the user and the traceback in a file for whoever mends it."""
    fault = find_layerplan_error(error)
    if fault is not None:
        return _report_fault(fault)
    with tempfile.NamedTemporaryFile("w", prefix="layerplan-", suffix=".log", encoding="utf-8", delete=False) as log:
        log.write(redact_text("".join(traceback.format_exception(error))))
    first_line = redact_text(str(error).strip().splitlines()[0]) if str(error).strip() else "no message"
    logger.error("%s: %s%s (details: %s)", type(error).__name__, first_line, _describe_loss(error), log.name)
    return 1


def _describe_loss(error: Exception) -> str:
    """What follows from it that Ray lost a process; a job that never reached Ray does not load it for that."""
    if "ray" not in sys.modules:
        return ""
    from layerplan.train.lost import AGAIN, find_loss

    if find_loss(error) is None:
        return ""
    return f"; a part of the Ray cluster was lost: {AGAIN}, what is finished is not repeated"
