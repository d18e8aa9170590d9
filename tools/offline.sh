#!/usr/bin/env bash
# Gather, on a machine with a network, what a cluster without one needs: wheels, and models.
#
#   bash tools/offline.sh FOLDER [HUB_NAME ...]
#   bash tools/offline.sh bundle llava-hf/llava-onevision-qwen2-7b-ov-hf BAAI/Aquila-VL-2B-llava-qwen
#
# FOLDER/wheels holds every package of requirements.txt for this machine's Python and platform: run it where both are as
# on the cluster, with PIP_EXTRA_INDEX_URL as there if torch's build is another. FOLDER/huggingface is a cache of
# the models: weights, tokenizers, configs. Copy FOLDER and this repository to the cluster, and there, once:
#
#   python3 -m venv .venv && .venv/bin/pip install --no-index --find-links FOLDER/wheels -r requirements.txt
#   echo 'export HF_HOME=FOLDER/huggingface' >>slurm/site.env
#
# Job scripts set HF_HUB_OFFLINE=1, so that nothing there waits for a network. Run again, it goes on where it stopped.
set -euo pipefail
case "${1:-}" in '' | -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit ;; esac
folder=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
source tools/setup.sh
setup_environment

mkdir -p "$folder/wheels"
echo "== Wheels"
# DeepSpeed comes as source: its wheel is made here. setuptools and wheel are for packages that are built there.
pip wheel -q --disable-pip-version-check --wheel-dir "$folder/wheels" -c constraints.txt -r requirements.txt setuptools wheel
for model in "$@"; do
    echo "== $model"
    HF_HOME=$folder/huggingface HF_HUB_OFFLINE=0 hf download "$model" \
        --include '*.json' '*.safetensors' '*.bin' '*.txt' '*.model' '*.jinja'
done
echo "$folder: $(find "$folder/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1)"
