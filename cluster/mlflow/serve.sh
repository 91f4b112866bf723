#!/usr/bin/env bash
# An MLflow server for a team: runs log to it with  tracking.uri=http://HOST:PORT  in the config.
#   DATA=/srv/mlflow cluster/mlflow/serve.sh        loopback unless HOST says otherwise
set -euo pipefail
DATA="${DATA:-$PWD/runs}"
mkdir -p "$DATA/mlartifacts"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
exec "${VENV:-.venv}/bin/mlflow" server --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" \
  --backend-store-uri "sqlite:///$DATA/mlflow.db" --artifacts-destination "$DATA/mlartifacts"
