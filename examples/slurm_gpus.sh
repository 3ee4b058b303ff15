#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300          # five minutes before the time limit: the run saves and leaves
#SBATCH --requeue
# Several GPUs on several machines: sbatch examples/slurm_gpus.sh. Batch sizes in recipes are of all GPUs together.
# Needs '.[accelerate]', and a $HOME that all machines see.
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
# shellcheck disable=SC2016  # expanded on each machine
srun bash -c 'exec accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * 8)) \
    --machine_rank $SLURM_PROCID --main_process_ip $MASTER_ADDR --main_process_port 29500 --mixed_precision no \
    -m tiltflow train sd3-pick-score --output $HOME/runs/pick --set prompts.path=prompts.txt --resume'
