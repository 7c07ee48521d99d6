#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice that has the package installed.
#
#   launch/tpu_pod.sh TPU_NAME ZONE --config configs/sdxl_gender.py --workdir /shared/run \
#     --config.train.batch_size=8
#
# What follows the name and the zone goes to `respodiff train`, which runs in the folder respodiff_jax of
# each host's home, a checkout of this repository; --workdir is on a file system that all hosts share. JAX
# finds the hosts by itself. Run it again after an interruption: the run continues.
set -euo pipefail
if (($# < 3)); then
  sed -n '2,9p' "$0" | cut -c3- >&2
  exit 2
fi
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd respodiff_jax && respodiff train --distributed auto $(printf '%q ' "$@")"
