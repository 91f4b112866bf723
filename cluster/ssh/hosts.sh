# Sourced by start.sh and stop.sh: which machines, and how a command and the environment reach one.
# shellcheck shell=bash
read -r -a hosts <<<"${HOSTS:-}"
[ "${#hosts[@]}" -gt 0 ] || die 'HOSTS is not set: the machines as ssh knows them, the head first, as in HOSTS="10.0.0.1 10.0.0.2"'
read -r -a ssh_command <<<"${SSH:-ssh}"
export RAY_PORT="${RAY_PORT:-6379}" DASHBOARD_PORT="${DASHBOARD_PORT:-8265}"
REPO="${REPO:-$PWD}"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

# What a machine is given: settings, and the secrets that jobs of the cluster have (layerplan/worker_setup.py).
TRAVELS=(RAY_AUTH_TOKEN RAY_PORT DASHBOARD_PORT RAY_TMPDIR RAY_OPTIONS IFNAME VENV HF_HOME HF_ENDPOINT HF_HUB_OFFLINE
  AWS_ENDPOINT_URL AWS_REGION AWS_DEFAULT_REGION
  HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
  MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN)

list_environment() {
  local name
  for name in "${TRAVELS[@]}"; do
    [ -z "${!name:-}" ] || printf '%s=%s\n' "$name" "${!name}"
  done
}

# Runs node.sh on a machine. The environment travels on standard input: an argument would show in every list of processes.
run_on() {
  local host="$1" words
  printf -v words ' %q' "${@:2}"
  list_environment | "${ssh_command[@]}" -o BatchMode=yes -o ConnectTimeout=10 "$host" \
    "cd $(printf %q "$REPO") && exec bash cluster/ssh/node.sh$words"
}

# What went wrong on a machine, in one line: what node.sh said, else what ssh or the shell there said last.
find_reason() {
  local said="$WORK/$1.err" line
  line="$(grep -m1 '^error: ' "$said" || tail -1 "$said")"
  if [ "$2" = 255 ]; then echo "not reached by ssh: ${line:-no reason given}"; else echo "${line#error: }"; fi
}

# Runs node.sh on machines at once, each one's answer in $WORK/HOST; ends with one line when it failed on one.
run_on_all() {
  local -a words=() pids=()
  while [ "$1" != -- ]; do words+=("$1"); shift; done
  shift
  local host index status failed=
  for host in "$@"; do
    run_on "$host" "${words[@]}" >"$WORK/$host" 2>"$WORK/$host.err" &
    pids+=($!)
  done
  for index in "${!pids[@]}"; do
    host="${@:$((index + 1)):1}"
    status=0
    wait "${pids[$index]}" || status=$?
    [ "$status" = 0 ] || [ -n "$failed" ] || failed="$host: $(find_reason "$host" "$status")"
  done
  [ -z "$failed" ] || { echo "error: $failed" >&2; return 1; }
}
