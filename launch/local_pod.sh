#!/usr/bin/env bash
# Trains on this machine as on a pod, in PROCESSES processes with DEVICES simulated CPU devices each.
#
#   launch/local_pod.sh [--dry-run] PROCESSES DEVICES --config configs/smoke.py --workdir runs/pod
#
# All other arguments go to `respodiff train`. The output is that of process 0; the others write to
# pod_I.log in a temporary folder, which is printed if one of them fails. The status is 75 if the run was
# interrupted and has saved. With --dry-run, the script prints the commands and does nothing.
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
  ended=0
  wait "$pid" || ended=$?
  # A failure matters more than 75, which is a run that was interrupted and has saved.
  if ((ended && (ended != 75 || status == 0))); then status=$ended; fi
done
if ((status == 0 || status == 75)); then
  rm -r "$logs"
else
  echo "a process failed with status $status; logs in $logs" >&2
fi
exit "$status"
