"""The folders of caches. If the home is missing or read-only, those of libraries move to a private folder.

Clusters mount homes read-only on compute nodes, and processes in containers may have none. Libraries that compile or
download something then raise, some of them only after the model was loaded.
"""

import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

# Variable with a library's cache folder -> its default: below another variable's folder, or below a default for that.
_CACHES = {
    "TORCH_EXTENSIONS_DIR": ("XDG_CACHE_HOME", "~/.cache", "torch_extensions"),
    "TRITON_CACHE_DIR": ("TRITON_HOME", "~", ".triton/cache"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "~/.config", "matplotlib"),
    "HF_HOME": ("XDG_CACHE_HOME", "~/.cache", "huggingface"),
}
_EXECUTED = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
_MAY_BE_READ_ONLY = ("HF_HOME",)  # it may hold all models already
CACHE = "EMBEDDING_PIPELINE_CACHE"  # the variable with this project's own cache folder


def replace_if_unwritable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables whose folders cannot be written to a private folder below /tmp, and print one line about it.

    Call it before those libraries are imported.
    """
    unwritable = {}
    for name in _CACHES:
        folder = _folder_of(name, environment)
        if not (
            is_writable(folder, executed=name in _EXECUTED)
            or (name in _MAY_BE_READ_ONLY and os.access(folder, os.R_OK | os.X_OK))
        ):
            unwritable[name] = folder
    if not unwritable or not (private := _private_folder()):
        return
    environment.update({name: str(private / name.lower()) for name in unwritable})
    if os.path.expanduser("~") == "~":  # noqa: PTH111
        environment["HOME"] = str(private)
    if environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0":
        print(
            f"warning: {next(iter(unwritable.values()))} cannot be written, or programs in it cannot be run: using "
            f"folders in {private} for {', '.join(unwritable)}; set these variables, or HOME, to writable folders",
            file=sys.stderr,
        )


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """This project's cache folder: by default it lies in Hugging Face's, where models have their place."""
    own = environment.get(CACHE)
    return Path(os.path.expanduser(own)) if own else _folder_of("HF_HOME", environment) / "embedding-pipeline"  # noqa: PTH111


def _folder_of(name: str, environment: Mapping[str, str]) -> Path:
    """The folder that a library's variable names, or its default."""
    above, default, below = _CACHES[name]
    path = environment.get(name) or os.path.join(environment.get(above) or default, below)  # noqa: PTH118
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for a user without a home)


def expanded(text: str) -> str:
    """A path or URL, perhaps after NAME=, with `~` expanded. A shell does not expand every one.

    Raises ValueError if it is empty, or if there is no such home.
    """
    if not text.strip():
        raise ValueError("it is empty: give a value, or omit it to use the default")
    name = found[0] if (found := re.match(r"[^/=]*=", text)) else ""
    path = text.removeprefix(name)
    if (expanded := os.path.expanduser(path)).startswith("~"):  # noqa: PTH111
        raise ValueError(f"{path}: there is no such home; write the whole path, or ./{path} if that is its name")
    return name + expanded


def is_writable(folder: Path, executed: bool = False) -> bool:
    """Whether the folder can be written or created; nothing is created.  executed: must programs run there?"""
    if str(folder).startswith("~"):
        return False
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return False
    return not (executed and os.statvfs(there).f_flag & os.ST_NOEXEC)


def _private_folder() -> Path | None:
    """A folder for this user alone, the same one every time if possible; None if none can be created."""
    for parent in (tempfile.gettempdir, lambda: "/var/tmp", os.getcwd):
        with suppress(OSError):
            if os.statvfs(parent()).f_flag & os.ST_NOEXEC:  # compiled code must be executable
                continue
            folder = Path(parent(), f"embedding-pipeline-{os.getuid()}")
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            # Anyone can write to /tmp: a folder that another user created may hold that user's programs.
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return folder
            return Path(tempfile.mkdtemp(dir=parent()))
    return None
