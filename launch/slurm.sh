#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster, one process per GPU.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/kd.py:... --workdir=/shared/runs/kd
#
# Set the partition, account and number of GPUs of a node for your cluster, here or as
# options of sbatch. --workdir and the data must be on a file system that all nodes share.
#
# jaxkd.main --distributed=auto reads what srun tells each process. JAX gives the process
# number i of a node its GPU number i, so every process must see all GPUs of its node:
# leave --gpu-bind=none, and do not use --gpus-per-task. On nodes without GPUs start one
# process per node: --ntasks-per-node=1 --gpus-per-node=0.
#
# Two minutes before the time limit SLURM sends SIGTERM: the run saves and ends with
# status 75, and the job is queued again to continue.
#SBATCH --job-name=jaxkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# The interpreter of the environment in which jaxkd is installed, on every node.
PYTHON=${PYTHON:-.venv/bin/python}

status=0
# A process that fails or saves ends the others itself: killed by srun, one that is
# still saving would make the status 137 or 143, and nothing would be queued again. srun
# does not take the number of cores over from sbatch.
srun --kill-on-bad-exit=0 --gpu-bind=none \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  "$PYTHON" -m jaxkd.main --distributed=auto "$@" || status=$?
if ((status == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
