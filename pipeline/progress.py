"""Progress bars for terminals and log files."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """tqdm's bar. In a log file, where it would print ten lines a second, it prints one every ten seconds."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 10, ncols=100, **options)
