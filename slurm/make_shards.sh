#!/usr/bin/env bash
# Convert a dataset to shards. The tasks of an array share the subsets of MMEB-train; other formats need --array=0.
#     sbatch slurm/make_shards.sh mmeb-train MMEB-train s3://bucket/mmeb-train
#     sbatch --array=0 slurm/make_shards.sh FORMAT SOURCE DEST [options of tools/make_shards.py]
#SBATCH --job-name=make-shards
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
source slurm/setup.sh

format=${1:?which FORMAT? see python tools/make_shards.py --help} source=${2:?from which SOURCE?} dest=${3:?to which DEST?}
shift 3
if [ "$format" = mmeb-train ]; then
    subsets=()
    number=0
    for folder in "$source"/*/; do
        subset=$(basename "$folder")
        [ "$subset" = images ] && continue
        if [ $((number++ % SLURM_ARRAY_TASK_COUNT)) = "$SLURM_ARRAY_TASK_ID" ]; then
            subsets+=("$subset")
        fi
    done
    [ ${#subsets[@]} -gt 0 ] || exit 0
    set -- "$@" --subset "${subsets[@]}"
elif [ "$SLURM_ARRAY_TASK_COUNT" != 1 ]; then
    echo "error: $format is not divided among the tasks of an array: submit it with --array=0" >&2
    exit 2
fi
exec "${CONTAINER[@]}" python -u tools/make_shards.py "$format" "$source" "$dest" --processes "${SLURM_CPUS_PER_TASK:-1}" "$@"
