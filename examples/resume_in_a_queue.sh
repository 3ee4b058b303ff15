#!/usr/bin/env bash
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@120          # two minutes before the time limit the run saves, and leaves with exit code 138
#SBATCH --requeue
#SBATCH --open-mode=append
# Resume in a queue: sbatch examples/resume_in_a_queue.sh. Each job goes on where the last one stopped, to the same bits.
# --resume from the start: where there is no checkpoint yet, the run starts.

code=0
srun tiltflow train digits-even-pixels --output "$HOME/runs/even" --resume --set training.checkpointing_steps=50 || code=$?
if [ "$code" -eq 138 ]; then       # 128 + SIGUSR1: saved, and not finished
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
