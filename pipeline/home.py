"""Use a private folder for the caches of libraries where the home directory is missing or read-only.

Clusters mount homes read-only on compute nodes, and containers may have none. Libraries that compile or download
something would then fail with a traceback, some only after the model is loaded.
"""

import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# Variable with a library's cache folder -> its default: (variable with the parent folder, default of that, name below).
_CACHES = {
    "TORCH_EXTENSIONS_DIR": ("XDG_CACHE_HOME", "~/.cache", "torch_extensions"),
    "TRITON_CACHE_DIR": ("TRITON_HOME", "~", ".triton/cache"),
    "NUMBA_CACHE_DIR": ("XDG_CACHE_HOME", "~/.cache", "numba"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "~/.config", "matplotlib"),
    "HF_HOME": ("XDG_CACHE_HOME", "~/.cache", "huggingface"),
}
_RUN = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
_ONLY_READ = ("HF_HOME",)  # a complete cache of models need not be writable


def replace_if_unwritable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Point the variables of unwritable caches to a private folder below /tmp, and print one warning.

    Call it before these libraries are imported.
    """
    unwritable = {}
    for name, (above, default, below) in _CACHES.items():
        given = environment.get(name) or os.path.join(environment.get(above) or default, below)  # noqa: PTH118
        folder = Path(os.path.expanduser(given))  # noqa: PTH111 (Path's version raises where the user has no home)
        if not (
            _is_writable(folder, to_be_run=name in _RUN)
            or (name in _ONLY_READ and os.access(folder, os.R_OK | os.X_OK))
        ):
            unwritable[name] = folder
    if not unwritable or not (private := _private_folder()):
        return
    environment.update({name: str(private / name.lower()) for name in unwritable})
    if os.path.expanduser("~") == "~":  # noqa: PTH111
        environment["HOME"] = str(private)
    if environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0":
        print(
            f"warning: {next(iter(unwritable.values()))} cannot be written, or run from: {', '.join(unwritable)} are "
            f"below {private} for now; set them, or HOME, to folders that can be",
            file=sys.stderr,
        )


def expanded(text: str) -> str:
    """Replace `~` by the home in a path, a URL or NAME=PATH, where not every shell does.

    Raises ValueError if the text is empty, or if there is no such home.
    """
    if not text.strip():
        raise ValueError("it is empty: give a value, or leave it out for its default")
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, sign, path = "", "", text
    if (found := os.path.expanduser(path)).startswith("~"):  # noqa: PTH111
        raise ValueError(f"{path}: there is no such home; write the whole path, or ./{path} if it is called so")
    return name + sign + found


def _is_writable(folder: Path, to_be_run: bool) -> bool:
    """Whether the folder can be written or created; creates nothing. to_be_run: files in it must be executable, too."""
    if str(folder).startswith("~"):
        return False
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return False
    return not (to_be_run and os.statvfs(there).f_flag & os.ST_NOEXEC)


def _private_folder() -> Path | None:
    """A folder that only this user can access, if possible the same every time; None if none can be made."""
    for parent in (tempfile.gettempdir, lambda: "/var/tmp", os.getcwd):
        with suppress(OSError):
            if os.statvfs(parent()).f_flag & os.ST_NOEXEC:  # compiled files must be executable
                continue
            folder = Path(parent(), f"embedding-pipeline-{os.getuid()}")
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            # Everybody can write to /tmp: a folder that somebody else made there may hold their programs.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return folder
            return Path(tempfile.mkdtemp(dir=parent()))
    return None
