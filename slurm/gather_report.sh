#!/usr/bin/env bash
# One report of all parts of an evaluation; slurm/eval_mmeb.sh submits it.
#SBATCH --job-name=report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=00:10:00
#SBATCH --output=%x-%j.out
source slurm/setup.sh
out=${1:?of which folder OUT?}
exec "${CONTAINER[@]}" python tools/gather_report.py "$out"/part-*.json --out "$out/report.json"
