#!/usr/bin/env bash
# Trains on Cloud TPU VM slices: requests them, installs this checkout on every host, trains, and
# continues after a preemption.
#
#   launch/tpu_pod.sh --name gender --zone us-east5-b --type v6e-16 --runtime v2-alpha-tpuv6e --spot \
#     --config configs/sdxl_gender.py --workdir gs://bucket/gender --config.train.batch_size=16
#
#   --name NAME       name of the queued resource; an existing one is used
#   --zone ZONE       a zone that has the type: `gcloud compute tpus accelerator-types list --zone ZONE`
#   --type TYPE       accelerator type of a slice
#   --runtime NAME    software of the TPU VMs
#   --slices N        number of slices, joined over the data-centre network (default 1)
#   --spot            use spot capacity: cheaper, may be preempted
#   --restarts N      maximum number of restarts after preemptions and lost hosts (default 20)
#   --delete          delete the queued resource after a successful training
#   --dry-run         print the commands, and do nothing
#
# All other arguments go to `respodiff train`. Every host must reach --workdir: use gs:// or a mounted
# file system. Configs and --concepts files must be below configs/, which is copied to the hosts; other
# inputs must be on gs://. The script uses gcloud's current project and account. Keep it running, for
# example in tmux: the training ends with the script, and continues when you start the script again.
set -euo pipefail
usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}
name='' zone='' type='' runtime='' slices=1 restarts=20 spot=() delete=false dry_run=false
while (($#)); do
  case $1 in
    --name | --zone | --type | --runtime | --slices | --restarts)
      (($# > 1)) || usage
      declare "${1#--}=$2"
      shift 2
      ;;
    --spot) spot=(--spot) && shift ;;
    --delete) delete=true && shift ;;
    --dry-run) dry_run=true && shift ;;
    *) break ;;
  esac
done
[[ $name && $zone && $type && $runtime && "$*" ]] || usage
cd "$(dirname "$0")/.."

# Prints a command, quoted for a shell.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}
# Runs a command, or prints it with --dry-run.
run() {
  if $dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}
say() { if $dry_run; then echo "# $1"; else echo "$1" >&2; fi; }
queued() { run gcloud compute tpus queued-resources "$@" --zone "$zone"; }
everywhere() { queued ssh "$name" --node=all --worker=all --command "$1"; }

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
state() {
  if queued describe "$name" --format='value(state.state)' 2>"$folder/error"; then
    return
  elif grep -q NOT_FOUND "$folder/error"; then
    echo NONE
  else
    cat "$folder/error" >&2
    echo UNKNOWN
  fi
}
create() {
  local nodes=(--node-id "$name")
  ((slices == 1)) || nodes=(--node-prefix "$name" --node-count "$slices")
  queued create "$name" "${nodes[@]}" --accelerator-type "$type" --runtime-version "$runtime" \
    ${spot[@]+"${spot[@]}"}
}
delete() { queued delete "$name" --force --quiet; }
wait_until_active() {
  local now unknown=0
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == UNKNOWN ]] || unknown=0
    case $now in
      NONE) create ;;
      SUSPENDED) delete ;; # preempted; the service does not resume it
      FAILED)
        say "the request failed; see: gcloud compute tpus queued-resources describe $name --zone $zone"
        exit 1
        ;;
      UNKNOWN)
        ((++unknown < 20)) || { say "gcloud failed to report the state of $name 20 times in a row"; exit 1; }
        sleep 30
        ;;
      *) say "$name is $now" && sleep 30 ;;
    esac
  done
}

package=(respodiff_jax configs setup.py pyproject.toml README.md)
# The Python of the VMs may be too old for the package; uv installs a newer one.
install='mkdir -p respodiff_jax && tar -xzf respodiff_jax.tar.gz -C respodiff_jax'
install+=' && python3 -m pip install --quiet --user uv'
install+=' && python3 -m uv venv --quiet --allow-existing --python 3.12 respodiff_venv'
install+=' && python3 -m uv pip install --quiet --python respodiff_venv "./respodiff_jax[tpu,gcs]"'
# A run that an earlier start left behind saves first.
train='pkill -TERM -x respodiff; timeout 120 sh -c "while pgrep -x respodiff; do sleep 1; done";'
train+=' pkill -KILL -x respodiff; cd respodiff_jax || exit;'
# A host that shuts down sends TERM, on which the run saves and ends with status 75. It also sends HUP,
# which would end the run before it has saved.
train+=" trap '' HUP; exec $(quoted ../respodiff_venv/bin/respodiff train --distributed auto "$@")"
archive=$folder/respodiff_jax.tar.gz
attempt() {
  queued scp "$archive" "$name:" --node=all --worker=all && everywhere "$install" &&
    everywhere "$train"
}

if $dry_run; then
  archive=respodiff_jax.tar.gz
  say "unless $name exists:"
  create
  say "when it is ACTIVE, with ${package[*]} in $archive:"
  attempt
  say "after a preemption, this and all of the above again, at most $restarts times:"
  delete
  if $delete; then
    say "at the end:"
    delete
  fi
  exit
fi

tar --exclude __pycache__ -czf "$archive" "${package[@]}"
for ((done = 0; ; done++)); do
  wait_until_active
  status=0
  attempt || status=$?
  ((status)) || break
  sleep 60 # until gcloud reports a preemption
  # Status 2 is a user's mistake, or all concepts diverged: a restart would fail again.
  if [[ $(state) == ACTIVE ]] && ((status == 2)) || ((done >= restarts)); then
    say "the run ended with status $status after $done restart(s)"
    exit "$status"
  fi
  say "status $status; restarting"
done
if $delete; then delete; fi
