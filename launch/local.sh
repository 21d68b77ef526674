#!/usr/bin/env bash
# Several processes of one run on this machine, mostly to try what a cluster would do.
#
#   launch/local.sh COUNT COMMAND...
#   launch/local.sh 2 python -m jaxkd.main --config=configs/kd.py:smoke --workdir=runs/two
#
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
# jaxkd.main reads. On a CPU, JAX_NUM_CPU_DEVICES=4 simulates four devices in each. On a
# machine with GPUs one process uses all of them and needs no script; GPU_EACH=1 gives
# each process one. PORT chooses the port where the processes meet.
#
# SIGTERM and Ctrl-C let all of them save and end; a second Ctrl-C ends them at once. When
# a process fails, the others have GRACE seconds (10) to end. The exit status is that of
# the first that failed; 75 means: stopped after saving, run the same command again to
# continue.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh COUNT COMMAND..." >&2
  exit 2
fi
count=$1
shift

if [[ -z ${PORT:-} ]]; then
  PORT=$(python3 -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
fi
export JAX_COORDINATOR_ADDRESS="localhost:$PORT" JAX_NUM_PROCESSES="$count"
running=()
for ((i = 0; i < count; i++)); do
  if [[ -n ${GPU_EACH:-} ]]; then export JAX_LOCAL_DEVICE_IDS=$i; fi
  JAX_PROCESS_ID=$i "$@" &
  running+=($!)
done

signal() {
  for pid in "${running[@]}"; do kill -"$1" "$pid" 2>/dev/null || true; done
}
interrupt() {
  if [[ -n $interrupted ]]; then
    signal KILL
    exit 130
  fi
  interrupted=yes
  signal TERM
  echo "launch/local.sh: waits for the processes to save; Ctrl-C again ends them at once" >&2
}
interrupted=
trap 'signal TERM' TERM
# Bash starts processes in the background so that they ignore Ctrl-C, and jaxkd leaves it
# at that.
trap interrupt INT

status=0
deadline=
while ((${#running[@]})); do
  sleep 0.2 || true
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code && !status)); then
      status=$code
      deadline=$((SECONDS + ${GRACE:-10}))
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [[ -n $deadline ]] && ((SECONDS > deadline)); then signal KILL; fi
done
exit "$status"
