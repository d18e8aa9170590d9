#!/usr/bin/env bash
# Submit a chain of jobs, each of which waits for the previous one: shards, training, evaluation, report.
#     bash slurm/pipeline.sh --shards "mmeb-train MMEB-train s3://bucket/mmeb-train" --train slurm/train_7b.sh \
#         --run /scratch/runs/llave-7b --evaluate s3://bucket/mmeb-eval [--parts 8] [key=value ...]
# Leave out --shards if the shards exist. key=value go to training; --parts jobs share the datasets of the evaluation.
# Prints the ids of the jobs. SBATCH_ACCOUNT, SBATCH_PARTITION and similar variables apply to all of them.
set -euo pipefail
shards=() train='' run='' tasks='' parts=8
while [ $# -gt 0 ]; do
    case $1 in
        --shards) read -ra shards <<<"$2" && shift 2 ;;
        --train) train=$2 && shift 2 ;;
        --run) run=$2 && shift 2 ;;
        --evaluate) tasks=$2 && shift 2 ;;
        --parts) parts=$2 && shift 2 ;;
        *=*) break ;;
        *) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
if [ -z "$train" ] || [ -z "$run" ]; then
    echo "error: --train names a job script, --run the run directory" >&2
    exit 2
fi

after=()
if [ ${#shards[@]} -gt 0 ]; then
    array=()
    [ "${shards[0]}" = mmeb-train ] || array=(--array=0)
    job=$(sbatch --parsable "${array[@]}" slurm/make_shards.sh "${shards[@]}")
    echo "shards: $job"
    after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
fi
job=$(sbatch --parsable "${after[@]}" "$train" run="$run" "$@")
echo "training: $job"
if [ -n "$tasks" ]; then
    jobs=$(bash slurm/eval_mmeb.sh --array="0-$((parts - 1))" --dependency="afterok:$job" --kill-on-invalid-dep=yes \
        "$run/export" "$tasks" "$run/mmeb")
    echo "evaluation, report: $jobs"
fi
