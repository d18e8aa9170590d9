#!/usr/bin/env bash
# All that one GPU can show, in at most 19 minutes and without a network; benchmarks/gpu_parts.py lists the parts.
#     bash benchmarks/gpu_all.sh [--dry-run] [TABLE.md]      from the repository's root
# Writes Markdown for benchmarks/RESULTS.md to TABLE.md (gpu_all.md), and what the parts print to TABLE.md.log. A part
# that fails, or exceeds its time, is named in the table, and the next one follows. --dry-run needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=()
if [ "${1:-}" = --dry-run ]; then
    dry=(--dry-run)
    shift
fi
out=${1:-gpu_all.md}
seconds=150 # for each part
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONPATH=$PWD
: >"$out.log"

missing=$(python - <<'PYTHON'
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for line in Path("requirements.txt").read_text().splitlines():
    if name := re.match(r"[\w.-]+", line):
        try:
            version(name[0])
        except PackageNotFoundError:
            print(name[0])
PYTHON
)
if [ -n "$missing" ]; then
    echo "not installed, so parts may fail: ${missing//$'\n'/, }" | tee "$out"
else
    : >"$out"
fi

status=0
if [ ${#dry[@]} -gt 0 ]; then # in one process: to start one takes longer than a part
    python benchmarks/gpu_parts.py --dry-run >>"$out" 2>>"$out.log" || status=1
else
    for part in heading attention 0.5b 2b loss encode demo; do
        code=0
        timeout --kill-after=10 "$seconds" python benchmarks/gpu_parts.py "$part" >>"$out" 2>>"$out.log" || code=$?
        [ "$code" = 0 ] || status=1
        if [ "$code" != 0 ] && [ "$code" != 3 ]; then # with 3 its section says that it failed
            printf '### %s: ended with status %s (124: after %s s)\n\n' "$part" "$code" "$seconds" >>"$out"
        fi
    done
fi
cat "$out"
exit "$status"
