#!/usr/bin/env bash
# Stops what start.sh started on these machines, and nothing else that runs on them.
#   HOSTS="10.0.0.1 10.0.0.2" cluster/ssh/stop.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source cluster/environment.sh
source cluster/ssh/hosts.sh
status=0
run_on_all stop -- "${hosts[@]}" || status=$?
for host in "${hosts[@]}"; do [ ! -s "$WORK/$host" ] || echo "$host: $(<"$WORK/$host")"; done
exit "$status"
