"""What every job's command line shares: arguments, exit codes, and errors as one clear line.

Exit codes: 0 done, 1 a fault while running, 2 a bad config, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from layerplan.config.load import load_config
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError, LayerplanError, find_layerplan_error
from layerplan.redaction import redact_text
from layerplan.telemetry import disable_bars_in_logs, disable_telemetry

JobFunction = Callable[[RunConfig, argparse.Namespace], None]


def build_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser with the arguments all jobs have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML config or a resolved_config.json")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one field; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; load no weights, take no GPU")
    return parser


def run_job(job: JobFunction, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parses, loads the config, runs the job, and returns its exit code.

    Args:
        job: The job; receives the validated config and the parsed arguments.
        parser: From `build_parser`, with the job's own arguments added.
        argv: Arguments; the process's own when left out.
    """
    args = parser.parse_args(argv)
    return run_guarded(lambda: job(load_config(args.config, args.set), args))


def run_guarded(work: Callable[[], None]) -> int:
    """Runs the work with telemetry off and turns every ending into an exit code and at most one line per fault."""
    disable_telemetry()
    disable_bars_in_logs()
    signal.signal(signal.SIGTERM, _stop_on_sigterm)
    try:
        work()
    except KeyboardInterrupt:
        print("stopped by the user; submit the same run name again to continue", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _report(error)
    return 0


def _stop_on_sigterm(signum: int, frame: FrameType | None) -> None:
    print("stopped by SIGTERM; submit the same run name again to continue", file=sys.stderr)
    raise SystemExit(143)


def _report_fault(error: LayerplanError) -> int:
    faults = error.faults if isinstance(error, ConfigError) else (str(error),)
    for fault in faults:
        print(f"error: {redact_text(fault)}", file=sys.stderr)
    return error.exit_code


def _report(error: Exception) -> int:
    """A fault of ours, or one line for the user and the traceback in a file for whoever mends it."""
    fault = find_layerplan_error(error)
    if fault is not None:
        return _report_fault(fault)
    with tempfile.NamedTemporaryFile("w", prefix="layerplan-", suffix=".log", delete=False) as log:
        log.write(redact_text("".join(traceback.format_exception(error))))
    first_line = redact_text(str(error).strip().splitlines()[0]) if str(error).strip() else "no message"
    print(f"error: {type(error).__name__}: {first_line} (details: {Path(log.name)})", file=sys.stderr)
    return 1
