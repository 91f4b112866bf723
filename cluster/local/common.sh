# Sourced by the local scripts: where Ray's own state lies, which ports it may use, and how it authenticates.
# shellcheck shell=bash
VENV="${VENV:-.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
export PATH="$VENV/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export RAY_COLOR_PREFIX=0
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# Ray replaces 127.0.0.1 by an address that other machines can reach, except where it thinks there are no others.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
