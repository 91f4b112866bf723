#!/usr/bin/env bash
# One node's part of job.sbatch, run there in the repository.
#   node.sh address                     the address that its name has, or the interface that IFNAME names
#   node.sh start HEAD PORT [OPTIONS]   a Ray node, in the foreground; options only for the head
#   node.sh clean                       removes what a node that was ended left
set -euo pipefail
source cluster/environment.sh

find_address() {
  local address
  if [ -n "${IFNAME:-}" ]; then find_interface_address; return; fi
  address="$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ { print $1; exit }')" || true
  [ -n "$address" ] || die "the name $(hostname) has no address but loopback's on its node: set IFNAME to the interface to use"
  echo "$address"
}

start() {
  local head="$1" port="$2" address
  shift 2
  address="$(find_address)"
  mkdir -m 700 "$RAY_TMPDIR" 2>/dev/null || [ -O "$RAY_TMPDIR" ] || die "$RAY_TMPDIR belongs to somebody else on $(hostname)"
  if [ "$#" -gt 0 ]; then set -- "$@" --port "$port"; else set -- --address "$head:$port"; fi
  # shellcheck disable=SC2086  # options are words
  ray start --block --node-ip-address "$address" --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
    --disable-usage-stats ${RAY_OPTIONS:-} "$@" >"$RAY_TMPDIR/node.log" 2>&1 &
  trap 'ended=yes; kill -TERM "$!"' TERM
  local status=0
  wait "$!" || status=$?
  [ "$status" -le 128 ] || wait "$!" || true
  [ -n "${ended:-}" ] || echo "error: the Ray node on $(hostname) ended: $(find_fault "$RAY_TMPDIR/node.log")" >&2
  remove_folder "$RAY_TMPDIR"
  return "$status"
}

case "$1" in
  address) find_address ;;
  start) start "${@:2}" ;;
  clean) [ ! -O "$RAY_TMPDIR" ] || remove_folder "$RAY_TMPDIR" ;;
esac
