#!/usr/bin/env bash
# Embed the captions of shards once with a text encoder, for LLM2CLIP's second stage.
#     sbatch slurm/embed.sh MODEL --shards s3://bucket/captions/cc3m [options of pipeline.embed]
# To continue a stopped job, submit it again.
#SBATCH --job-name=embed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
source slurm/setup.sh
exec srun --kill-on-bad-exit=1 "${CONTAINER[@]}" python -u -m pipeline.embed "$@"
