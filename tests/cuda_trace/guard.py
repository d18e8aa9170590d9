"""Load the compiled CUDA device of guard.cpp. Call `load` before torch is imported: it asks for its hooks only once."""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> None:
    """Compile guard.cpp against the installed torch, unless a library for both is cached, and load the library."""
    assert "torch" not in sys.modules, "torch is imported already, and would not see the device"
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch = Path(spec.origin).parent
    version = (torch / "version.py").read_text()
    name = hashlib.sha256(f"{torch}\n{version}\n{_SOURCE.read_text()}".encode()).hexdigest()[:16]
    library = _cache() / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Another process may do the same: each writes its own file, and a rename replaces a whole one by a whole one.
        own = library.with_suffix(f".{os.getpid()}")
        command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch}/include", str(_SOURCE), "-o", str(own)]
        subprocess.run([*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"], check=True)
        own.replace(library)
    ctypes.CDLL(str(library))


def _cache() -> Path:
    """The folder in which torch, too, keeps the extensions that it compiles."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{home}/torch_extensions").expanduser() / "cuda_trace"
