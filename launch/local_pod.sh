#!/usr/bin/env bash
# Trains on this machine as on a pod: PROCESSES processes of DEVICES simulated CPU devices each.
#
#   launch/local_pod.sh [--dry-run] 2 2 --config configs/smoke.py --workdir runs/pod
#
# What follows the two numbers goes to `respodiff train`. Output is that of process 0; the others write
# to pod_I.log in a temporary folder, named if one of them fails. With --dry-run the commands are
# printed, and nothing is done.
set -euo pipefail
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}
dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
(($# > 2)) || usage
processes=$1 devices=$2
shift 2
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
logs=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
for ((i = processes - 1; i >= 0; i--)); do
  command=(python3 -m respodiff_jax train "$@"
    --coordinator "localhost:$port" --num-processes "$processes" --process-id "$i")
  if $dry_run; then
    printf 'JAX_PLATFORMS=%s XLA_FLAGS=%s' "$JAX_PLATFORMS" "$XLA_FLAGS"
    printf ' %q' "${command[@]}"
    echo ' &'
    continue
  fi
  if ((i == 0)); then "${command[@]}" & else "${command[@]}" >"$logs/pod_$i.log" 2>&1 & fi
  pids+=($!)
done
status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # a signal to this script interrupts it
  done
  wait "$pid" || status=$?
done
if ((status)); then
  echo "a process failed with status $status; logs in $logs" >&2
else
  rm -r "$logs"
fi
exit "$status"
