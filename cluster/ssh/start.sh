#!/usr/bin/env bash
# A Ray cluster over machines reached by SSH, all with the repository and its environment at the same path.
#   HOSTS="10.0.0.1 10.0.0.2" RAY_AUTH_TOKEN=... cluster/ssh/start.sh
# The first host becomes the head. Its dashboard listens on loopback: reach it with
#   ssh -L 8265:127.0.0.1:8265 HEAD     and then     ray job submit --address http://127.0.0.1:8265 ...
set -euo pipefail
: "${HOSTS:?set HOSTS to the machines, the head first}"
: "${RAY_AUTH_TOKEN:?set RAY_AUTH_TOKEN to one secret shared by all machines}"
REPO="${REPO:-$PWD}"
PORT="${RAY_PORT:-6379}"
read -r -a hosts <<<"$HOSTS"
head="${hosts[0]}"

# The token travels on standard input: an argument would show in every process list.
start_on() {
  ssh "$1" "read -r RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0;
    export GLOO_SOCKET_IFNAME='${IFNAME:-}' NCCL_SOCKET_IFNAME='${IFNAME:-}';
    [ -n \"\$GLOO_SOCKET_IFNAME\" ] || unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME;
    cd '$REPO' && .venv/bin/ray start $2" <<<"$RAY_AUTH_TOKEN"
}

start_on "$head" "--head --node-ip-address $head --port $PORT --dashboard-host 127.0.0.1 --disable-usage-stats"
for host in "${hosts[@]:1}"; do
  start_on "$host" "--address $head:$PORT --node-ip-address $host"
done
echo "cluster of ${#hosts[@]} machines; head $head"
