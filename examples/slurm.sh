#!/bin/bash
# A run on several nodes under SLURM: sbatch examples/slurm.sh run.yaml [options of `opd train`]
#
# One task a GPU, and no launcher in between. Ten minutes before the time is up SLURM sends SIGTERM: the ranks save
# after the step at hand and end; submit the same line again to go on.
#SBATCH --job-name=opd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --output=%x-%j.log

set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE

srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m opd.launch.train "$@" --resume auto' opd "$@"
