#!/usr/bin/env bash
# Starts one of the scripts on every task of a Slurm job, on one node or many: bash configs/slurm/launch.sh train.py …
# Each task gets the names that torchrun would give it. What Slurm sends to the job (SIGTERM before its time is over)
# reaches every one, and the status is that of the scripts, which torchrun would hide.
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "${LOGS:=logs}"
# the first task that ends gives the others 30 seconds: enough to end by themselves, with a status of their own
exec srun --kill-on-bad-exit=0 --wait=${WAIT:-30} --output="$LOGS/%x-%j-rank%t.log" --open-mode=append \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" "$@"' launch "$@"
