#!/usr/bin/env bash
# Write the report of an evaluation after an array has embedded the items. slurm/eval_mmeb.sh submits this job.
#SBATCH --job-name=report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=24G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
source slurm/setup.sh
exec "${CONTAINER[@]}" python -u -m pipeline.evaluate "$@"
