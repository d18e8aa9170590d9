#!/usr/bin/env bash
# Train LLaVE-7B on two nodes of eight 80 GB GPUs.
#     sbatch slurm/train_7b.sh [key=value ...]      from the repository's root; see docs/clusters.md
#SBATCH --job-name=llave-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
RECIPE=pipeline/recipes/llave_7b.yaml
source slurm/launch.sh
