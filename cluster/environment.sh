# Sourced by every launcher: its environment, what stays quiet, and how Ray authenticates.
# shellcheck shell=bash
VENV="${VENV:-.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
export PATH="$VENV/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
# Seconds that `ray job stop` gives a job to save its checkpoint before it is killed; Ray's own are 3.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-600}"

die() {
  echo "error: $*" >&2
  exit 1
}

# Ends what setsid started: asked first, made to after ten seconds. Ray's workers are groups of their own in its session.
end_group() {
  kill -TERM -- "-$1" 2>/dev/null || true
  for _ in $(seq 40); do is_left "$1" || return 0; sleep 0.25; done
  kill -KILL -- "-$1" 2>/dev/null || true
  ! has_sessions || pkill -KILL --session "$1" || true
}

# Removes what Ray wrote; its last processes may write once more while they end.
remove_folder() {
  for _ in $(seq 20); do
    rm -rf "$1" 2>/dev/null || true
    sleep 0.5
    [ -e "$1" ] || return 0
  done
  echo "note: $1 on $(hostname) is still written to; remove it later" >&2
}

is_left() {
  if has_sessions; then pgrep --session "$1" >/dev/null; else kill -0 -- "-$1" 2>/dev/null; fi
}

has_sessions() {
  [ -d /proc ] && command -v pkill >/dev/null
}

# The IPv4 address of the interface that IFNAME names.
find_interface_address() {
  local address
  address="$(ip -o -4 address show dev "$IFNAME" 2>/dev/null | awk '{sub("/.*", "", $4); print $4; exit}')" || true
  [ -n "$address" ] || die "IFNAME=$IFNAME: $(hostname) has no such interface with an IPv4 address"
  echo "$address"
}

# What a log of `ray start` says of its end: the last line that names an error, else the last one.
find_fault() {
  sed 's/\x1b\[[0-9;]*m//g; /^[[:space:]]*$/d' "$1" | awk '/[Ee]rror|[Ee]xception|[Ff]ailed/ { fault = $0 } { last = $0 }
    END { print fault ? fault : last }'
}
