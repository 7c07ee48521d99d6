#!/usr/bin/env bash
# Trains on Slurm nodes with GPUs, one process per GPU.
#
#   sbatch --nodes 2 launch/slurm.sh --config configs/sd14_gender.py --workdir /shared/run \
#     --config.train.batch_size=16
#
# The arguments go to `respodiff train`, which must be on the PATH of the nodes. Before the time limit
# Slurm sends SIGTERM: the run saves, the job is queued again, and the run continues. A preempted job is
# queued again, too. `scancel` ends the job. With --dry-run before the arguments, the script prints the
# command of the job instead; this needs no Slurm.
#SBATCH --job-name=respodiff
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
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
# JAX gives each task the GPU of its local rank, so each task must see all GPUs of its node. A task that
# has saved ends with status 75; the others must not be killed for it.
status=0
"${run[@]}" srun --gpu-bind=none --kill-on-bad-exit=0 respodiff train --distributed auto "$@" ||
  status=$?
if ((status == 75)); then
  scontrol requeue "$SLURM_JOB_ID" || echo "submit the job again to continue" >&2
fi
exit "$status"
