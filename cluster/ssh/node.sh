#!/usr/bin/env bash
# One machine's part of start.sh and stop.sh, run there in the repository; its environment comes as lines NAME=value on
# standard input.
#   node.sh check ROLE            says its address and versions; fails where a node cannot start
#   node.sh start ROLE ADDRESS HEAD
#   node.sh await NODES           on the head: until so many nodes are there
#   node.sh stop                  stops what start made, and nothing else
set -euo pipefail
while IFS= read -r line; do export "${line?}"; done
source cluster/environment.sh
STATE="${RAY_TMPDIR:-/tmp}/layerplan-$(id -un)-$RAY_PORT"

is_running() {
  [ -f "$STATE/pid" ] && kill -0 -- "-$(<"$STATE/pid")" 2>/dev/null
}

# The address by which this machine was reached, or that of the interface that was named.
find_address() {
  if [ -n "${IFNAME:-}" ]; then find_interface_address; else awk '{ print $3 }' <<<"$SSH_CONNECTION"; fi
}

check() {
  [ -x "$VENV/bin/ray" ] || die "no $VENV/bin/ray: the environment must lie at the same path on all machines (VENV=...)"
  ! is_running || die "a node that was started here on RAY_PORT=$RAY_PORT still runs: cluster/ssh/stop.sh first"
  local address
  address="$(find_address)"
  if [ "$1" = head ]; then
    ADDRESS="$address" python cluster/local/ports.py check "RAY_PORT=$RAY_PORT"
    python cluster/local/ports.py check "DASHBOARD_PORT=$DASHBOARD_PORT"
  fi
  echo "address $address"
  python cluster/versions.py
}

start() {
  local role="$1" address="$2" head="$3"
  local -a options=(--address "$head:$RAY_PORT")
  [ "$role" = worker ] || options=(--head --port "$RAY_PORT" --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT")
  if [ -n "${IFNAME:-}" ]; then export GLOO_SOCKET_IFNAME="$IFNAME" NCCL_SOCKET_IFNAME="$IFNAME"; fi
  mkdir -p "${STATE%/*}"
  mkdir -m 700 "$STATE" 2>/dev/null || [ -O "$STATE" ] || die "$STATE belongs to somebody else"
  # Ray gives a node 30 s to come up, which is not always enough for a busy machine
  try_to_start || { grep -q 'timed out during startup' "$STATE/log" && try_to_start; } ||
    die "Ray did not start: $(find_fault "$STATE/log") ($STATE/log)"
}

# shellcheck disable=SC2086  # options are words
try_to_start() {
  # bash reads ~/.bashrc where it thinks that ssh runs it, and a job's shell would find another python there
  unset SSH_CLIENT SSH2_CLIENT SSH_CONNECTION SSH_TTY
  setsid ray start --block --node-ip-address "$address" --disable-usage-stats "${options[@]}" ${RAY_OPTIONS:-} \
    >"$STATE/log" 2>&1 </dev/null &
  echo $! >"$STATE/pid"
  for _ in $(seq 240); do
    sleep 0.5
    ! grep -q 'Ray runtime started' "$STATE/log" || return 0
    is_running || return 1
  done
  end_group "$(<"$STATE/pid")"
  return 1
}

stop() {
  if is_running; then end_group "$(<"$STATE/pid")"; echo stopped; else echo "nothing was running"; fi
  rm -f "$STATE/pid"
}

case "$1" in
  check) check "$2" ;;
  start) start "$2" "$3" "$4" ;;
  await) python cluster/await_nodes.py "$2:$RAY_PORT" "$3" ;;
  stop) stop ;;
esac
