# Sourced by the other scripts: makes .venv with everything in it, once, and puts it on PATH.
# shellcheck shell=bash
# Expects to run in the repository's root.

setup_environment() {
    local wanted python
    wanted=$(cat requirements.txt requirements-dev.txt constraints.txt | sha256sum)
    if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
        command -v c++ >/dev/null || setup_failed "a C++ compiler is missing: apt-get install g++"
        for python in python3.12 python3.11 python3; do
            "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
        done || setup_failed "Python 3.11 or 3.12 is missing: apt-get install python3 python3-venv python3-dev"
        "$python" -c 'import ensurepip' 2>/dev/null || setup_failed "apt-get install python3-venv"
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
            setup_failed "Python's headers are missing, which DeepSpeed's kernels need: apt-get install python3-dev"
        echo "Setting up .venv with $("$python" --version): a few minutes, once."
        "$python" -m venv .venv  # what an earlier .venv holds besides stays
        # DeepSpeed comes as source, of which older pips make no wheel without `wheel`.
        .venv/bin/pip install -q --disable-pip-version-check setuptools wheel
        .venv/bin/pip install -q --disable-pip-version-check -c constraints.txt \
            -r requirements.txt -r requirements-dev.txt
        echo "$wanted" >.venv/.installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

setup_failed() {
    echo "error: $1" >&2
    exit 1
}

# Processes to start, and what each may use: one per GPU (the demo's eight lanes divide by 1, 2, 4 and 8), or two
# on the CPU.
choose_processes() {
    PROCESSES=$(python -c 'import torch
print(max((n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()), default=0))')
    if [ "$PROCESSES" = 0 ]; then
        PROCESSES=2
        export DS_ACCELERATOR=cpu
        export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    fi
}
