#!/usr/bin/env bash
# Evaluate a model: the tasks of an array share the datasets, and a job that depends on them makes the report.
#     bash slurm/eval_mmeb.sh [sbatch's flags] MODEL TASKS OUT [key=value ...]    submits both, and prints their ids
# The flags, as --array=0-35 or --dependency=afterok:ID, are the array's; key=value are options of pipeline.evaluate.
# TASKS as in mmeb=s3://bucket/mmeb-eval. OUT/report.html has the figures, the second job's output the table.
# Submitted again after a failure, with any --array, it embeds only what is not in OUT yet.
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
if [ "${1:-}" = --task ]; then # of the array; SLURM_ARRAY_TASK_ID may also be of a job around
    task=$1
    shift
fi
flags=()
while [[ ${1:-} == -* ]]; do
    flags+=("$1")
    shift
done
model=${1:?which MODEL?} tasks=${2:?which TASKS?} out=${3:?to which folder OUT?}
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
