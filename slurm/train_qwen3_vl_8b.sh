#!/usr/bin/env bash
# Train Qwen3-VL-8B on a node of eight GPUs.
#     sbatch slurm/train_qwen3_vl_8b.sh [key=value ...]      from the repository's root; see docs/clusters.md
#SBATCH --job-name=qwen3-vl-8b
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
RECIPE=pipeline/recipes/qwen3_vl_8b.yaml
source slurm/launch.sh
