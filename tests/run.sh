#!/usr/bin/env bash
# Set up if needed, check style and types, and run the tests.
#     bash tests/run.sh                    everything
#     bash tests/run.sh --fast             the quick tests, in about two minutes
#     bash tests/run.sh tests/objectives -x    these tests: any other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # each of hundreds of processes would compile the project again
source tools/setup.sh
COMPILE=--no-compile setup_environment
site=.venv/sentence_transformers
if ! cmp -s tests/sentence_transformers.txt "$site/installed.txt"; then
    rm -rf "$site"
    pip install -q --disable-pip-version-check --no-deps --target "$site" -r tests/sentence_transformers.txt
    cp tests/sentence_transformers.txt "$site/installed.txt"
fi
if [ $# = 0 ]; then
    # Compile kernels for this clone only, so that kernels of other clones on this machine have no effect.
    export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
    # Ranks that tests kill leave semaphores behind; multiprocessing would warn about each.
    export PYTHONWARNINGS="ignore:resource_tracker:UserWarning"
    # The cluster's tests take the longest and wait half of the time, so they run beside all others, and beside mypy.
    # First they compile DeepSpeed's CPU Adam, which takes a minute; the integration tests need it, too.
    printed=$(mktemp) damaged=$(mktemp)
    python -m pytest tests/integration/slurm >"$printed" 2>&1 &
    cluster=$! chaos=
    # After Ctrl-C they would go on: the shell starts background processes with SIGINT ignored, which they undo.
    trap 'kill -INT $cluster $chaos 2>/dev/null || true; rm -f "$printed" "$damaged"' EXIT
fi
status=0
ruff check . || status=$?
ruff format --check . || status=$?
mypy || status=$?
if [ "${1:-}" = --fast ]; then
    shift
    # The slowest tests are listed: mark those over two seconds as slow.
    OMP_NUM_THREADS=1 python -m pytest --ignore=tests/integration -n 2 --dist loadfile --fast \
        --durations=10 --durations-min=2 "$@" || status=$?
    exit "$status"
fi
[ "$status" = 0 ] || exit "$status"
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Unit tests, two files at a time, in the order of tests/conftest.py.
by_file=(-n 2 --dist loadfile --no-loadscope-reorder)
OMP_NUM_THREADS=1 python -m pytest --ignore=tests/integration "${by_file[@]}" || status=$?
# Another processor may add numbers in another order. Tests that allow for rounding must also pass with the basic
# instructions that every processor has. Skip this if the processor has only these.
if ! python -c 'import torch; raise SystemExit(torch.backends.cpu.get_cpu_capability() != "DEFAULT")'; then
    mapfile -t numeric < <(
        grep -rlE --include='test_*.py' --exclude-dir=integration 'closeness|assert_close|allclose' tests
    )
    ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 python -m pytest "${numeric[@]}" --rounded "${by_file[@]}" || status=$?
fi
# Random damage and signals; the seed fixes the trials. One trial of each sort, or as many as fit in four minutes.
python tests/chaos/run.py --seed 1 --trials 15 --minutes 4 >"$damaged" 2>&1 &
chaos=$!
# Two files at a time: a test often waits, or has one process.
python -m pytest tests/integration --ignore=tests/integration/slurm "${by_file[@]}" || status=$?
wait "$chaos" || status=$?
cat "$damaged"
wait "$cluster" || status=$?
cat "$printed"
exit "$status"
