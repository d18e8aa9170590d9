"""`python tools/preflight.py` in a checkout is `pipeline-preflight` of an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.preflight import main

if __name__ == "__main__":
    main()
