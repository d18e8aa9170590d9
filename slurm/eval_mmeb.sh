#!/usr/bin/env bash
# Evaluate a model. The tasks of an array share the datasets; a job that depends on the array writes the report.
#     bash slurm/eval_mmeb.sh [flags of sbatch] MODEL SETS OUT [key=value ...]    submits both and prints their ids
# The flags, for example --array=0-35 or --dependency=afterok:ID, go to the array. SETS are NAME=URL, with commas between
# them, as mmeb=s3://bucket/mmeb-eval. key=value are options of pipeline.evaluate. The scores are in OUT/report.html and
# in the output of the second job. After a failure submit it again, with any --array: finished work in OUT is kept.
#SBATCH --job-name=eval-mmeb
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
task=
if [ "${1:-}" = --task ]; then # this is a task of the array; SLURM_ARRAY_TASK_ID may also belong to an outer job
    task=$1
    shift
fi
flags=()
while [[ ${1:-} == -* ]]; do
    flags+=("$1")
    shift
done
model=${1:?which MODEL?} tasks=${2:?which SETS?} out=${3:?to which folder OUT?}
if [ -z "$task" ]; then
    array=$(sbatch --parsable "${flags[@]}" slurm/eval_mmeb.sh --task "$@")
    echo "$array"
    report=$(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes slurm/gather_report.sh \
        "$model" "$tasks" "${@:4}" out="$out")
    echo "$report"
    exit
fi

source slurm/setup.sh
exec srun --kill-on-bad-exit=1 "${CONTAINER[@]}" python -u -m pipeline.evaluate "$model" "$tasks" "${@:4}" \
    part="$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?}))/$SLURM_ARRAY_TASK_COUNT" out="$out"
