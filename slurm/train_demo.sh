#!/usr/bin/env bash
# Test the cluster: train the demo's tiny model on two nodes, with or without GPUs.
#     sbatch slurm/train_demo.sh data.url=s3://bucket/demo/train 'evaluation.urls=[s3://bucket/demo/eval]'
#SBATCH --job-name=demo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=00:30:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
RECIPE=pipeline/recipes/demo.yaml
source slurm/launch.sh
