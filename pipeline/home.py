"""A home that is missing or cannot be written: what libraries keep there goes to a private folder instead.

Clusters mount homes read-only on compute nodes, and containers give processes none. Libraries that compile or fetch
something then end in a traceback, some of them only after the model was loaded.
"""

import os
import re
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# Variables that say where a library keeps something, and where it does without: (variable, if that is not set), below.
_CACHES = {
    "TORCH_EXTENSIONS_DIR": ("XDG_CACHE_HOME", "~/.cache", "torch_extensions"),
    "TRITON_CACHE_DIR": ("TRITON_HOME", "~", ".triton/cache"),
    "NUMBA_CACHE_DIR": ("XDG_CACHE_HOME", "~/.cache", "numba"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "~/.config", "matplotlib"),
    "HF_HOME": ("XDG_CACHE_HOME", "~/.cache", "huggingface"),
}
_RUN = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
_ONLY_READ = ("HF_HOME",)  # by who has all models there already


def replace_if_unwritable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of what could not be written to a folder of this user's below /tmp, and say so in one line.

    To be called before those libraries are imported.
    """
    unwritable = {}
    for name, (above, default, below) in _CACHES.items():
        folder = environment.get(name) or os.path.join(environment.get(above) or default, below)  # noqa: PTH118
        folder = Path(os.path.expanduser(folder))  # noqa: PTH111 (Path's raises where nobody knows of a home)
        if not (
            _is_writable(folder, to_be_run=name in _RUN)
            or (name in _ONLY_READ and os.access(folder, os.R_OK | os.X_OK))
        ):
            unwritable[name] = folder
    if not unwritable or not (private := _private_folder()):
        return
    environment |= {name: str(private / name.lower()) for name in unwritable}
    if os.path.expanduser("~") == "~":  # noqa: PTH111
        environment["HOME"] = str(private)
    if environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0":
        print(
            f"warning: {next(iter(unwritable.values()))} cannot be written, or run from: {', '.join(unwritable)} are "
            f"below {private} for now; set them, or HOME, to folders that can be",
            file=sys.stderr,
        )


def expanded(text: str) -> str:
    """A path or URL, or NAME= before it, with `~` as the home: a shell replaces it only where it sees that it is one.

    Raises ValueError where it is empty, and where nobody knows of such a home.
    """
    if not text.strip():
        raise ValueError("it is empty: give a value, or leave it out for its default")
    name, path = re.fullmatch(r"([^/=]*=)?(.*)", text, re.DOTALL).groups("")
    if (found := os.path.expanduser(path)).startswith("~"):  # noqa: PTH111
        raise ValueError(f"{path}: there is no such home; write the whole path, or ./{path} if it is called so")
    return name + found


def _is_writable(folder: Path, to_be_run: bool) -> bool:
    """Whether it can be written, or made: nothing is.  to_be_run: and what is written there, run."""
    if str(folder).startswith("~"):
        return False
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return False
    return not (to_be_run and os.statvfs(there).f_flag & os.ST_NOEXEC)


def _private_folder() -> Path | None:
    """One for this user alone, the same every time if it can be; None if there is no place for it."""
    for parent in (tempfile.gettempdir, lambda: "/var/tmp", os.getcwd):
        with suppress(OSError):
            if os.statvfs(parent()).f_flag & os.ST_NOEXEC:  # what is compiled must be run
                continue
            folder = Path(parent(), f"embedding-pipeline-{os.getuid()}")
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            # /tmp is everybody's: what somebody else made there may hold programs of theirs.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return folder
            return Path(tempfile.mkdtemp(dir=parent()))
    return None
