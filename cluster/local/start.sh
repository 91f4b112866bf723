#!/usr/bin/env bash
# Starts a one-machine Ray cluster on loopback, in the foreground: stop it with Ctrl-C.
#   cluster/local/start.sh            GCS on 6379, dashboard on http://127.0.0.1:8265
#   RAY_PORT=7000 DASHBOARD_PORT=8300 cluster/local/start.sh
# Submit from another shell with the same RAY_AUTH_MODE and RAY_AUTH_TOKEN (or ~/.ray/auth_token). Ray's other commands, such
# as `ray status`, need RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 there, or they look for the cluster at this machine's own address.
set -euo pipefail
cd "$(dirname "$0")/../.."
source cluster/local/common.sh
RAY_PORT="${RAY_PORT:-6379}"
DASHBOARD_PORT="${DASHBOARD_PORT:-8265}"
python cluster/local/ports.py check "RAY_PORT=$RAY_PORT" "DASHBOARD_PORT=$DASHBOARD_PORT"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
  [ -f "$HOME/.ray/auth_token" ] || (umask 077 && ray get-auth-token --generate >/dev/null)
  chmod 600 "$HOME/.ray/auth_token"
fi
exec ray start --head --block --node-ip-address 127.0.0.1 --port "$RAY_PORT" \
  --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --disable-usage-stats
