#!/usr/bin/env bash
# Measures all figures of "One NVIDIA GPU" in docs/performance.md, in at most 12 minutes.
#
#   launch/gpu_figures.sh OUT [MODEL_14 MODEL_XL]
#
# OUT gets a table (.md), all numbers (.json) and the messages (.log) of each benchmark, and gpu.csv. The
# models are by default random weights of the published architectures. A benchmark that fails or takes
# too long is named, and the others run; the status is then 1. Needs the torch extra.
set -euo pipefail
if [[ $# != 1 && $# != 3 ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(realpath "$1") sd14=${2-random/sd14} sdxl=${3-random/sdxl} status=0
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv"

bench() { # NAME SECONDS WHAT CONFIG MODEL BATCH OPTION...
  local name=$1 seconds=$2
  local command=(respodiff bench "$3" --config "configs/$4.py" --config.model.name="$5"
    --config.train.batch_size="$6" --repeats 3 --out "$out/$1.json" "${@:7}")
  echo "$name, at most $seconds s: ${command[*]}"
  if timeout "$seconds" "${command[@]}" >"$out/$name.md" 2>"$out/$name.log"; then
    cat "$out/$name.md"
  else
    echo "$name failed with status $?, see $out/$name.log" >&2
    status=1
  fi
}

bench train_sd14 220 train sd14_gender "$sd14" 16
bench generate_sd14 280 generate sd14_gender "$sd14" 8 --against torch
bench generate_sdxl 220 generate sdxl_gender "$sdxl" 4
exit $status
