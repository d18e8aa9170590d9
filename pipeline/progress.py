"""Progress bars that suit a terminal and a log file alike."""

import sys

from tqdm import tqdm


def progress_bar(**options: object) -> tqdm:
    """tqdm's, which in a log file would otherwise write ten lines a second: there one every ten seconds."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 10, ncols=100, **options)
