#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet. Log kubectl in to the cluster, and install JobSet
# on it first.
#
#   launch/gke.sh --name gender --image REGION-docker.pkg.dev/PROJECT/REPO/respodiff \
#     --accelerator tpu-v6e-slice --topology 4x4 --slices 2 \
#     --config configs/sdxl_gender.py --workdir gs://bucket/gender --config.train.batch_size=32
#
#   --name NAME             name of the JobSet
#   --image IMAGE           has the package, its tpu and gcs extras, and the config; see docs/clusters.md
#   --accelerator TYPE      node label cloud.google.com/gke-tpu-accelerator
#   --topology SHAPE        topology of a slice, node label cloud.google.com/gke-tpu-topology
#   --chips-per-host N      chips of the node pool's machine type (default 4)
#   --slices N              number of slices, one node pool each (default 1)
#   --restarts N            maximum number of restarts after preemptions and lost hosts (default 20)
#   --service-account NAME  Kubernetes service account that may write to --workdir
#   --dry-run               print the manifest, and do nothing
#
# All other arguments go to `respodiff train`. To watch and to stop the run:
#   kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=NAME --prefix
#   kubectl delete jobset NAME
set -euo pipefail
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}
name='' image='' accelerator='' topology='' chips_per_host=4 slices=1 restarts=20
service_account=default dry_run=false
while (($#)); do
  case $1 in
    --name | --image | --accelerator | --topology | --slices | --restarts | --chips-per-host | \
      --service-account)
      (($# > 1)) || usage
      option=${1#--}
      declare "${option//-/_}=$2"
      shift 2
      ;;
    --dry-run) dry_run=true && shift ;;
    *) break ;;
  esac
done
[[ $name && $image && $accelerator && $topology && "$*" ]] || usage
chips=$((${topology//x/*}))
hosts=$((chips / chips_per_host))
if ((hosts * chips_per_host != chips)); then
  echo "a slice of $topology has $chips chips, which --chips-per-host $chips_per_host does not divide" >&2
  exit 2
fi

# Prints a text as a YAML string in single quotes.
text() { echo "'${1//\'/\'\'}'"; }
manifest() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$name")
  annotations:
    # Each job is a slice, and has a node pool for itself.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    # Status 2 is a user's mistake, or all concepts diverged: a restart would fail again.
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0 # when one host is lost, all start again
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            serviceAccountName: $(text "$service_account")
            terminationGracePeriodSeconds: 120 # on TERM the run saves and ends with status 75
            shareProcessNamespace: true # as process 1, the run would ignore TERM while it starts
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
              cloud.google.com/gke-tpu-topology: $(text "$topology")
            containers:
            - name: train
              image: $(text "$image")
              ports:
              - containerPort: 8471 # the TPU runtime's
              - containerPort: 8080 # between slices
              - containerPort: 8482 # JAX's coordinator
              # The hosts find each other by the TPU_WORKER_* and MEGASCALE_* variables of GKE.
              command: [respodiff, train, --distributed, auto]
              args:
$(for argument in "$@"; do echo "              - $(text "$argument")"; done)
              resources:
                limits:
                  google.com/tpu: $chips_per_host
EOF
}
if $dry_run; then
  echo "# kubectl apply --filename - takes:"
  manifest "$@"
else
  manifest "$@" | kubectl apply --filename -
fi
