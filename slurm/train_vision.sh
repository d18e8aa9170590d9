#!/usr/bin/env bash
# Train LLM2CLIP's vision encoder, its second stage, on one node of eight 80 GB GPUs.
#     sbatch slurm/train_vision.sh [key=value ...]      from the repository's root; see docs/clusters.md
#SBATCH --job-name=llm2clip-vision
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
RECIPE=${RECIPE:-pipeline/recipes/llm2clip_vision.yaml}
source slurm/launch.sh
