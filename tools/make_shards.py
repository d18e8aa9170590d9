"""`python tools/make_shards.py` in a checkout is `pipeline-make-shards` of an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.make_shards import main

if __name__ == "__main__":
    main()
