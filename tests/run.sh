#!/usr/bin/env bash
# Set up if need be, check style, run all tests. Arguments go to pytest:  bash tests/run.sh tests/losses -x
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh
setup_environment
ruff check .
ruff format --check .
exec python -m pytest "$@"
