# Sourced by the other scripts. Makes .venv with all packages, once, and puts it on PATH.
# shellcheck shell=bash
# Expects to run in the repository's root.

# With COMPILE=--no-compile, Python compiles packages at their first import. Most modules are never imported; but where
# .venv belongs to another user or is mounted read-only, each process would compile torch again.
setup_environment() {
    local wanted python compile=${COMPILE:---compile}
    wanted=$(cat requirements.txt requirements-dev.txt constraints.txt | sha256sum)
    if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
        command -v c++ >/dev/null || setup_failed "a C++ compiler is missing: apt-get install g++"
        for python in python3.12 python3.11 python3; do
            "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
        done || setup_failed "Python 3.11 or 3.12 is missing: apt-get install python3 python3-venv python3-dev"
        "$python" -c 'import ensurepip' 2>/dev/null || setup_failed "apt-get install python3-venv"
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
            setup_failed "Python's headers, which DeepSpeed's kernels need, are missing: apt-get install python3-dev"
        echo "Setting up .venv with $("$python" --version): a few minutes, once."
        "$python" -m venv .venv  # keeps what an earlier .venv holds
        # PyPI has DeepSpeed only as source; older versions of pip need `wheel` to build it.
        .venv/bin/pip install -q --disable-pip-version-check "$compile" setuptools wheel
        .venv/bin/pip install -q --disable-pip-version-check "$compile" -c constraints.txt \
            -r requirements.txt -r requirements-dev.txt
        echo "$wanted" >.venv/.installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

setup_failed() {
    echo "error: $1" >&2
    exit 1
}

# Choose the number of processes: one for each GPU (1, 2, 4 or 8, which divide the demo's eight lanes), or two on the
# CPU, which share its cores.
choose_processes() {
    PROCESSES=$(python -c 'import torch
print(max((n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()), default=0))')
    if [ "$PROCESSES" = 0 ]; then
        PROCESSES=2
        export DS_ACCELERATOR=cpu
        export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    fi
}
