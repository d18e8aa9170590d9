#!/usr/bin/env bash
# Collect wheels and models for a cluster without a network. Run this on a machine that has one.
#
#   bash tools/offline.sh FOLDER [HUB_NAME ...]
#   bash tools/offline.sh bundle llava-hf/llava-onevision-qwen2-7b-ov-hf BAAI/Aquila-VL-2B-llava-qwen
#
# FOLDER/wheels gets every package of requirements.txt for this machine's Python and platform, which must be those of the
# cluster. Set PIP_EXTRA_INDEX_URL for another build of torch. FOLDER/huggingface gets the models: weights, tokenizers,
# configs. Copy FOLDER and this repository to the cluster, and there, once:
#
#   python3 -m venv .venv && .venv/bin/pip install --no-index --find-links FOLDER/wheels -r requirements.txt
#   echo 'export HF_HOME=FOLDER/huggingface' >>slurm/site.env
#
# Job scripts set HF_HUB_OFFLINE=1, so that no program waits for a network. Run this again to continue where it stopped.
set -euo pipefail
case "${1:-}" in '' | -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit ;; esac
folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
source tools/setup.sh
setup_environment

mkdir -p "$folder/wheels"
echo "== Wheels"
# PyPI has DeepSpeed only as source: this builds its wheel. Packages that are built on the cluster need setuptools and wheel.
pip wheel -q --disable-pip-version-check --wheel-dir "$folder/wheels" -c constraints.txt -r requirements.txt setuptools wheel
for model in "$@"; do
    echo "== $model"
    HF_HOME=$folder/huggingface HF_HUB_OFFLINE=0 hf download "$model" \
        --include '*.json' '*.safetensors' '*.bin' '*.txt' '*.model' '*.jinja'
done
echo "$folder: $(find "$folder/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1)"
