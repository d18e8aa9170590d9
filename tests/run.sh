#!/usr/bin/env bash
# Set up if need be, check style, run all tests. Arguments go to pytest:  bash tests/run.sh tests/objectives -x
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
setup_environment
ruff check .
ruff format --check .
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Kernels are compiled for this clone alone: nothing that others on this machine left counts.
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
# DeepSpeed's CPU Adam, which takes a minute to compile, is there when the integration tests begin.
DS_ACCELERATOR=cpu PYTHONPATH=. python tests/integration/build_cpu_adam.py >/dev/null 2>&1 &
# Of ranks that were killed, as tests do, there is always some semaphore left, which multiprocessing would tell.
export PYTHONWARNINGS="ignore:resource_tracker:UserWarning"
status=0
# What runs in one process, two at a time.
OMP_NUM_THREADS=1 python -m pytest --ignore=tests/integration -n 2 --dist loadfile || status=$?
# On another processor sums are ordered otherwise. What compares numbers within rounding passes with the instructions that
# every processor has, too, unless these are all that this one has.
if ! python -c 'import torch; raise SystemExit(torch.backends.cpu.get_cpu_capability() != "DEFAULT")'; then
    mapfile -t numeric < <(
        grep -rlE --include='test_*.py' --exclude-dir=integration 'closeness|assert_close|allclose' tests
    )
    ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 python -m pytest "${numeric[@]}" -n 2 --dist loadfile || status=$?
fi
wait
# What starts processes of its own and waits for them; beside it what runs on a cluster, and waits most of the time.
printed=$(mktemp)
python -m pytest tests/integration/slurm >"$printed" 2>&1 &
cluster=$!
python -m pytest tests/integration --ignore=tests/integration/slurm || status=$?
wait "$cluster" || status=$?
cat "$printed"
rm "$printed"
# Damage and signals at random, of which the seed makes always the same: of each sort one, or as many as two minutes reach.
python tests/chaos/run.py --seed 1 --trials 15 --minutes 2 || status=$?
exit "$status"
