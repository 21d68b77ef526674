#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice, one process per host.
#
#   launch/tpu_pod.sh NAME ZONE setup
#   launch/tpu_pod.sh NAME ZONE run --config=configs/kd.py:... --workdir=/mnt/shared/kd
#
# NAME is a TPU VM that exists (`gcloud compute tpus tpu-vm create`). `setup` copies the
# last commit of this checkout to every host and installs it there; `run` starts the
# command on all of them and shows what they say. jaxkd.main --distributed=auto finds the
# other hosts by the metadata of the slice. --workdir and the data must be on a file
# system that all hosts share, such as a bucket mounted with gcsfuse or a Filestore share.
# PYTHON names the hosts' interpreter (3.11 or later) for `setup`.
#
# Ctrl-C ends the connections, not the processes: `launch/tpu_pod.sh NAME ZONE stop` lets
# them save and end; the same `run` again continues.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE setup|run|stop [ARGUMENT...]" >&2
  exit 2
fi
name=$1 zone=$2 action=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case $action in
  setup)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    if [[ -n $(git status --porcelain) ]]; then
      echo "launch/tpu_pod.sh: copies the last commit, without your uncommitted changes:" >&2
      git status --short >&2
    fi
    git archive --format=tar.gz --output="$folder/jaxkd.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$folder/jaxkd.tar.gz" "$name:" \
      --zone="$zone" --worker=all
    on_all_hosts "mkdir -p jaxkd && tar -xzf jaxkd.tar.gz -C jaxkd && cd jaxkd &&
      ${PYTHON:-python3.11} -m venv .venv &&
      .venv/bin/python -m pip install -q -c constraints.txt . 'jax[tpu]'"
    ;;
  run)
    # Quoted once more: the hosts' shells take the command apart again.
    on_all_hosts "cd jaxkd && exec .venv/bin/python -m jaxkd.main --distributed=auto $(printf '%q ' "$@")"
    ;;
  stop)
    # In brackets, so that the pattern does not find the shell that looks for it.
    on_all_hosts "pkill -TERM -f '[p]ython -m jaxkd.main' || true"
    ;;
  *)
    echo "unknown action '$action'; use setup, run or stop" >&2
    exit 2
    ;;
esac
