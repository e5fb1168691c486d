#!/usr/bin/env bash
# Runs a script on every task of a Slurm job, on one node or several: bash configs/slurm/launch.sh train.py …
# Each task gets the environment variables that torchrun sets. Signals that Slurm sends to the job (SIGTERM before the
# time limit) reach every task, and the exit status is that of the script, which torchrun would hide.
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Not all clusters set SLURM_NTASKS for a job with --ntasks-per-node.
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))}
export LOCAL_WORLD_SIZE=$((WORLD_SIZE / SLURM_JOB_NUM_NODES)) PYTHON=${PYTHON:-.venv/bin/python}
# Since Slurm 22.05 srun does not take over --cpus-per-task of the job: each task would have one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
fi
mkdir -p "${LOGS:=logs}"
# After the first task ends, the others have 30 seconds to end by themselves, with their own status.
exec srun --kill-on-bad-exit=0 --wait=${WAIT:-30} --output="$LOGS/%x-%j-rank%t.log" --open-mode=append \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" "$@"' launch "$@"
