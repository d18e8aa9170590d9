#!/usr/bin/env bash
# Submit LLM2CLIP as a chain of jobs, each of which waits for the previous one: text encoder, vectors of the captions,
# vision encoder, evaluation, report.
#     bash slurm/train_llm2clip.sh --runs /scratch/runs/llm2clip --data s3://bucket/captions --datasets cc3m \
#         [--vectors s3://mine/vectors] [--evaluate flickr30k=/data/flickr30k,urban1k=/data/urban1k] \
#         [--caption "key=value ..."] [--vision "key=value ..."] [--demo] [key=value ...]
# --datasets names the second stage's datasets below --data, with commas between them. The first stage uses the recipe's
# datasets, or --caption "data.datasets=[...]". --vectors is where the vectors go, if not beside the shards. key=value go to
# both trainings. --demo uses the demo's recipes and two processes. Prints the ids of the jobs. SBATCH_ACCOUNT,
# SBATCH_PARTITION and similar variables apply to all of them.
set -euo pipefail
runs='' data='' datasets='' vectors=beside tasks='' caption=() vision=() flags=() demo=
while [ $# -gt 0 ]; do
    case $1 in
        --runs) runs=$2 && shift 2 ;;
        --data) data=$2 && shift 2 ;;
        --datasets) datasets=$2 && shift 2 ;;
        --vectors) vectors=$2 && shift 2 ;;
        --evaluate) tasks=$2 && shift 2 ;;
        --caption) read -ra caption <<<"$2" && shift 2 ;;
        --vision) read -ra vision <<<"$2" && shift 2 ;;
        --demo) demo=yes && shift ;;
        *=*) break ;;
        *) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
if [ -z "$runs" ] || [ -z "$data" ] || [ -z "$datasets" ]; then
    echo "error: --runs names a directory, --data the shards' URL, --datasets those that have images and captions" >&2
    exit 2
fi
recipes=(pipeline/recipes/llm2clip_caption.yaml pipeline/recipes/llm2clip_vision.yaml)
if [ -n "$demo" ]; then
    recipes=(pipeline/recipes/demo_caption.yaml pipeline/recipes/demo_llm2clip.yaml)
    flags=(--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --mem=8G --time=01:00:00)
fi
after() { printf -- '--dependency=afterok:%s --kill-on-invalid-dep=yes' "$1"; }

first=$(RECIPE=${recipes[0]} sbatch --parsable "${flags[@]}" slurm/train_caption.sh \
    run="$runs/caption" data.url="$data" "$@" "${caption[@]}")
echo "text encoder: $first"
shards=() out=()
IFS=, read -ra names <<<"$datasets"
for name in "${names[@]}"; do shards+=(--shards "$data/$name"); done
if [ "$vectors" != beside ]; then # the folder of the one dataset, or the parent folder of several
    out=(--out "$vectors")
    [ ${#names[@]} -gt 1 ] || out=(--out "$vectors/$datasets")
fi
read -ra waits <<<"$(after "$first")"
embedded=$(sbatch --parsable "${flags[@]}" "${waits[@]}" slurm/embed.sh "$runs/caption/export" "${shards[@]}" "${out[@]}")
echo "vectors: $embedded"
read -ra waits <<<"$(after "$embedded")"
second=$(RECIPE=${recipes[1]} sbatch --parsable "${flags[@]}" "${waits[@]}" slurm/train_vision.sh \
    run="$runs/vision" model.text_encoder="$runs/caption/export" data.url="$data" "data.datasets=[$datasets]" \
    data.text_embeddings="$vectors" "$@" "${vision[@]}")
echo "vision encoder: $second"
if [ -n "$tasks" ]; then
    read -ra waits <<<"$(after "$second")"
    jobs=$(bash slurm/eval_mmeb.sh --array=0 "${waits[@]}" "$runs/vision/export" "$tasks" "$runs/report")
    echo "evaluation, report: $jobs"
fi
