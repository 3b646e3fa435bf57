#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8
# sbatch config/maml_124m.sh, in the repository, on machines that share data and out. Never run yet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or restarted processes may call the dead
head=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=8 --rdzv_backend=c10d --max_restarts=3 \
    --rdzv_endpoint=$head:29500 train.py config/maml_124m.py --init_from=resume
