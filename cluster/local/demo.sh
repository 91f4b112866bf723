#!/usr/bin/env bash
# The quick start, from an empty machine to a report: starts a Ray cluster of its own, submits the job, shows its
# output, and stops exactly what it started, however it ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
source cluster/local/common.sh
RUNS="${RUNS:-$PWD/runs}"
CONFIG="${CONFIG:-jobs/configs/quickstart.yaml}"
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
unset RAY_ADDRESS
FREE="$(python cluster/local/ports.py free 3)"
{ read -r PORT; read -r DASHBOARD; read -r AGENT; } <<<"$FREE"
RAY_TMPDIR="$(mktemp -d /tmp/lp.XXXXXX)"
export RAY_TMPDIR RAY_AUTH_TOKEN
mkdir -p "$RUNS"

stop() {
  status=$?
  trap - EXIT INT TERM
  [ -z "${RAY_PID:-}" ] || end_group "$RAY_PID"
  rm -rf "$RAY_TMPDIR"
  exit "$status"
}
# What Ray says about itself; the run's own lines, warnings and errors stay.
without_engine_talk() {
  grep --line-buffered -v -E -e '(INFO|WARNING) (packaging|working_dir|sdk|dashboard_sdk|cli|job_manager)\.py' \
    -e 'SUCC cli\.py.*---' -e '^\(TrainController' -e '(Setting up process group|Reporting training result)' \
    -e '(issues/53727|PYTHON worker processes|NUMA binding|Triton is installed)'
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "starting a local Ray cluster (dashboard http://127.0.0.1:$DASHBOARD)"
setsid ray start --head --block --node-ip-address 127.0.0.1 --port "$PORT" --dashboard-host 127.0.0.1 \
  --dashboard-port "$DASHBOARD" --dashboard-agent-listen-port "$AGENT" --temp-dir "$RAY_TMPDIR" \
  --disable-usage-stats >"$RAY_TMPDIR/head.log" 2>&1 &
RAY_PID=$!
disown "$RAY_PID"
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$DASHBOARD"
for attempt in $(seq 120); do
  ray job list >/dev/null 2>&1 && break
  if ! kill -0 "$RAY_PID" 2>/dev/null || [ "$attempt" = 120 ]; then
    echo "error: the Ray cluster did not start:" >&2
    tail -5 "$RAY_TMPDIR/head.log" >&2
    exit 1
  fi
  sleep 0.5
done

ray job submit --log-color false --working-dir . -- python jobs/cpt.py --config "$CONFIG" \
  --set storage_path="$RUNS" "$@" 2>&1 | without_engine_talk
echo
echo "lineage   make ui"
