#!/usr/bin/env bash
# The report of an evaluation whose items an array embedded; slurm/eval_mmeb.sh submits it.
#SBATCH --job-name=report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=24G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
source slurm/setup.sh
exec "${CONTAINER[@]}" python -u -m pipeline.evaluate "$@"
