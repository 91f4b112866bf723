"""Nothing about a run leaves the machine: every engine's own reporting is switched off before it is imported."""

from __future__ import annotations

import os
import sys

QUIET_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def disable_telemetry() -> None:
    """Sets the variables that turn telemetry off, in this process and those it starts; call it before any engine."""
    os.environ.update(QUIET_VARIABLES)


def disable_bars_in_logs() -> None:
    """Keeps Hugging Face's progress bars to terminals that can redraw a line; call it before they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
