#!/bin/bash
# Train on several machines by Slurm: sbatch examples/slurm.sh --preset vit_b16 --data-dir data/shop ...
# Three minutes before its time is up the job is sent SIGUSR1: the run writes a checkpoint and ends, the job is queued
# again, and --resume continues where it was. The run folder must lie on a file system that all machines see.
#SBATCH --job-name=eclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a machine, one rank a GPU (NPROC overrides). A second start finds the checkpoint.
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:${PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m eclip.train --resume "$@" &
run=$!

# srun passes the signal on to every torchrun, and these to their ranks.
again=no
trap 'again=yes; kill -USR1 "$run"' USR1
wait "$run"
status=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait` before the run has ended
    wait "$run"
    status=$?
done

if [ "$again" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
