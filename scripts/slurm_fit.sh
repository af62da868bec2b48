#!/usr/bin/env bash
# `saeforge fit` on SLURM, one process a GPU, that saves before its time is up and goes on in the next job:
#     sbatch scripts/slurm_fit.sh configs/models/llama-3.1-8b.yaml runs/llama     # CONFIG RUN [more options of fit]
# Change the #SBATCH lines to your cluster. data.lanes must be a multiple of all processes together (8 by default).
#
#SBATCH --job-name=saeforge-fit
#SBATCH --nodes=1
# One task a GPU, as trainer.devices; Lightning reads the ranks from SLURM, so --ntasks alone is not enough.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# SIGUSR1 to every task (not "B:", which is this script alone) five minutes before the end: fit finishes the step, saves
# RUN/checkpoints/last.ckpt and exits with 138. Give it more time where a checkpoint (12 bytes a parameter) takes longer.
#SBATCH --signal=USR1@300
# A preempted job comes back by itself; its SIGTERM saves, too.
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
config=${1:?CONFIG} run=${2:?RUN}
shift 2

resume=()
[[ -f $run/checkpoints/last.ckpt ]] && resume=(--ckpt_path last)

# A rank that is lost ends the others, which say so. --wait is for one that is lost before they have met.
srun --wait=600 saeforge fit --config "$config" --run "$run" \
    --trainer.devices "${SLURM_NTASKS_PER_NODE:?}" --trainer.num_nodes "${SLURM_NNODES:?}" --trainer.strategy ddp \
    "${resume[@]}" "$@"
code=$?

# 138: stopped by SIGUSR1. 75: a rank was lost; 137: and it was killed (srun reports the highest code). All go on from the
# checkpoint, the latter in five jobs at most. 143 is SIGTERM: a cancelled job stays cancelled, and SLURM requeues a
# preempted one.
if [[ $code == 138 || (($code == 75 || $code == 137) && ${SLURM_RESTART_COUNT:-0} -lt 5) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
