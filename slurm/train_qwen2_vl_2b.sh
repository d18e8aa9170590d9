#!/usr/bin/env bash
# Train Qwen2-VL-2B on a node of eight GPUs.
#     sbatch slurm/train_qwen2_vl_2b.sh [key=value ...]      from the repository's root; see docs/clusters.md
#SBATCH --job-name=qwen2-vl-2b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
RECIPE=pipeline/recipes/qwen2_vl_2b.yaml
source slurm/launch.sh
