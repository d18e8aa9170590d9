#!/usr/bin/env bash
# Train a tiny LLaVE on synthetic images from a real S3 server, and print what it learned. See README.md.
#
#   bash tools/quickstart.sh [key=value ...]      fields of pipeline/recipes/demo.yaml, e.g. steps=50
#   bash tools/quickstart.sh --tour               look at the result: report, TensorBoard, a search by sentences
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh

case "${1:-}" in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit ;;
    --tour)
        [ $# = 1 ] || setup_failed "--tour takes no fields: it shows the run that the last quickstart made"
        [ -d runs/quickstart ] || setup_failed "there is no runs/quickstart to look at: bash tools/quickstart.sh makes it"
        setup_environment
        exec python tools/tour.py runs/quickstart
        ;;
esac
for override in "$@"; do
    case $override in
        run=*) setup_failed "the quickstart always writes runs/quickstart from scratch; leave out $override" ;;
        *=*) ;;
        *) setup_failed "$override is no key=value; --tour and --help stand alone" ;;
    esac
done

setup_environment
choose_processes
export PROCESSES run=runs/quickstart
began=$SECONDS
rm -rf "$run"

train_and_evaluate() {
    echo "== Generating synthetic images and uploading their shards to $AWS_ENDPOINT_URL"
    python tools/make_shards.py demo 0 s3://pipeline-demo
    echo "== Training on $PROCESSES processes"
    torchrun --standalone --nproc-per-node "$PROCESSES" -m pipeline.train pipeline/recipes/demo.yaml "$@" run="$run"
    echo "== Evaluating the exported model"
    torchrun --standalone --nproc-per-node "$PROCESSES" -m pipeline.evaluate "$run/export" \
        s3://pipeline-demo/eval,text-video=s3://pipeline-demo/clips \
        against="$run/evaluation/step-00000000.json" out="$run/report"
}
export -f train_and_evaluate

echo "== Starting an S3 server"
python tools/s3_server.py --bucket pipeline-demo -- \
    bash -euo pipefail -c 'train_and_evaluate "$@"' quickstart "$@" &
server=$!
# However this script ends, the server stops the command and itself.
trap 'kill -TERM $server 2>/dev/null && wait $server || true' EXIT
trap 'exit 130' INT TERM HUP
wait $server

echo
echo "Without the set-up this took $((SECONDS - began)) seconds."
echo "The run, with its exported model:  $run"
echo "Its report:                        $run/report/report.html"
echo "Its curves:                        .venv/bin/tensorboard --logdir $run/tensorboard"
echo "Look at all of it, and search:     bash tools/quickstart.sh --tour"
