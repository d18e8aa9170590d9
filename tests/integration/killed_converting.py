"""`python -m pipeline.embed` that is killed while it converts the model: `python killed_converting.py ARGUMENTS`."""

import os
import signal
from pathlib import Path

from safetensors.torch import save_file

from pipeline import embed
from pipeline.models.llave import weights


def main() -> None:
    def save(tensors: dict, file: Path, metadata: dict) -> None:
        """Kill the process after one of two files."""
        save_file(tensors, file, metadata)
        os.kill(os.getpid(), signal.SIGKILL)

    weights.save_file = save
    embed.main()


if __name__ == "__main__":
    main()
