#!/usr/bin/env bash
# Trains on Slurm nodes with GPUs, one process per GPU; JAX finds the processes by itself.
#
#   sbatch --nodes 2 launch/slurm.sh --config configs/sd14_gender.py --workdir /shared/run \
#     --config.train.batch_size=16
#
# What follows the script goes to `respodiff train`, which is on the PATH of the nodes. Slurm sends
# SIGTERM before the time limit; the run then saves, and continues when submitted again. With --dry-run
# before the arguments, launch/slurm.sh prints what a node would run, and needs no Slurm.
#SBATCH --job-name=respodiff
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
run=()
if [[ ${1-} == --dry-run ]]; then
  run=(echo)
  shift
fi
if (($# == 0)); then
  sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
fi
# JAX gives each task the GPU of its local rank, so each must see all of the node's.
"${run[@]}" srun --gpu-bind=none respodiff train --distributed auto "$@"
