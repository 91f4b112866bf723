#!/usr/bin/env bash
# A Ray cluster over machines reached by SSH, all with the repository and its environment at the same path.
#   HOSTS="10.0.0.1 10.0.0.2" RAY_AUTH_TOKEN=... cluster/ssh/start.sh
#   HOSTS="10.0.0.1 10.0.0.2" cluster/ssh/stop.sh
# The first host becomes the head. A node listens on the address by which it is reached, or on that of IFNAME=eth1; the head's
# dashboard on loopback there. RAY_PORT, DASHBOARD_PORT, RAY_TMPDIR, RAY_OPTIONS="--num-cpus 8", VENV, REPO and
# SSH="ssh -F FILE" say otherwise than usual.
set -euo pipefail
cd "$(dirname "$0")/../.."
source cluster/environment.sh
source cluster/ssh/hosts.sh
[ -n "${RAY_AUTH_TOKEN:-}" ] || die "RAY_AUTH_TOKEN is not set: one secret for all machines, such as that of openssl rand -hex 32"
head="${hosts[0]}"
workers=("${hosts[@]:1}")

twice="$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | head -1)"
[ -z "$twice" ] || die "HOSTS names $twice twice: one node a machine"
run_on_all check head -- "$head"
run_on_all check worker -- "${workers[@]}"
for host in "${hosts[@]}"; do
  address="$(awk '$1 == "address" { print $2 }' "$WORK/$host")"
  if [ "${#hosts[@]}" -gt 1 ] && [[ "$address" == 127.* || "$address" == ::1 ]]; then
    die "$host: was reached on loopback, where other machines do not reach it; name it by another address or set IFNAME"
  fi
  other="$(awk 'NR == FNR { at_head[$1] = $2; next } $1 != "address" && at_head[$1] != $2 {
    print $1 " " $2 ", but " at_head[$1] " on the head"; exit }' "$WORK/$head" "$WORK/$host")"
  [ -z "$other" ] || die "$host: $other; all machines need the same"
  echo "$address" >"$WORK/$host.address"
done

stop_what_started() {
  run_on_all stop -- "${hosts[@]}" 2>/dev/null || true
  exit 1
}
head_address="$(<"$WORK/$head.address")"
run_on_all start head "$head_address" "$head_address" -- "$head" || stop_what_started
pids=()
for host in "${workers[@]}"; do
  run_on_all start worker "$(<"$WORK/$host.address")" "$head_address" -- "$host" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=yes; done
[ -z "${failed:-}" ] || stop_what_started
run_on_all await "$head_address" "${#hosts[@]}" -- "$head" || stop_what_started
echo "cluster of ${#hosts[@]} machines, head $head_address:$RAY_PORT. To submit, with the same RAY_AUTH_TOKEN:"
echo "  ssh -N -L $DASHBOARD_PORT:127.0.0.1:$DASHBOARD_PORT $head &"
echo "  RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:$DASHBOARD_PORT --working-dir . -- python jobs/cpt.py --config ... --set storage_path=/shared/runs"
