#!/usr/bin/env bash
# Train a tiny LLaVE on the demo world from a real S3 server, and show what it learned. See README.md.
#
#   bash tools/quickstart.sh [key=value ...]      fields of pipeline/recipes/demo.yaml, e.g. steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
setup_environment
choose_processes
began=$SECONDS

export run=${QUICKSTART_RUN:-runs/demo}
rm -rf "$run"

train_and_evaluate() {
    echo "== Drawing the demo world and uploading its shards to $AWS_ENDPOINT_URL"
    python tools/make_shards.py demo 0 s3://pipeline-demo
    echo "== Training on $PROCESSES processes"
    torchrun --standalone --nproc-per-node "$PROCESSES" -m pipeline.train pipeline/recipes/demo.yaml run="$run" "$@"
    echo "== Evaluating the exported model"
    torchrun --standalone --nproc-per-node "$PROCESSES" -m pipeline.evaluate "$run/export" s3://pipeline-demo/eval \
        against="$run/evaluation/step-00000000.json" example=Scene-T2I out="$run/evaluation/export.json"
}
export -f train_and_evaluate
export PROCESSES

echo "== Starting an S3 server"
python tools/s3_server.py --bucket pipeline-demo -- bash -euo pipefail -c 'train_and_evaluate "$@"' quickstart "$@"

echo
echo "Set-up aside this took $((SECONDS - began)) seconds."
echo "The run, with its exported model:  $run"
echo "Its curves:                        .venv/bin/tensorboard --logdir $run/tensorboard"
