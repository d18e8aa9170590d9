"""A folder's manifest.json: sizes and checksums of its files, to detect damage before anything is loaded.

    {"format": 1, "step": 100, "block": 67108864, "files": {NAME: {"bytes": 123, "crc32": [one number a block]}}}

It is written last. The work is divided among ranks by file, and among threads by block. Checkpoints of older versions
have no manifest; their files are zip archives, which contain their own sizes and checksums.
"""

import errno
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import PipelineError
from pipeline.storage.atomic import write_file

FILE, FORMAT = "manifest.json", 1
_BLOCK = 64 << 20  # bytes per checksum; CRC-32 detects any single flipped bit, whatever the size
_PIECE = 1 << 20  # bytes read at once: they fit in the processor's cache
_RANK = re.compile(r"(?:zero_pp_rank_|offloaded_tensors/rank)0*(\d+)")
# Errors that mean damage. After any other error the file may be readable later.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


class Damaged(PipelineError):
    """A file or folder is not as it was written."""


class File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int
    crc32: list[int]


class Manifest(BaseModel):
    """files: path below the folder -> entry; None for an archive, which is checked by its own checksums."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    step: int
    block: int
    files: dict[str, File | None]


def writer_of(name: str) -> int:
    """Return the rank that writes and reads the checkpoint file with this name."""
    match = _RANK.search(name)
    return int(match.group(1)) if match else 0


def names_of(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it."""
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def sums(folder: Path, names: Iterable[str], meanwhile: Callable[[], None] | None = None) -> dict[str, File]:
    """Return the sizes and checksums of files, by name.

    meanwhile: runs in parallel. It may sync the files to disk: checksums of new files are read from the page cache.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    with ThreadPoolExecutor(_threads() + 1) as pool:
        beside = pool.submit(meanwhile) if meanwhile else None
        found = {
            name: [pool.submit(_crc32, folder / name, start, _BLOCK) for start in range(0, size, _BLOCK)]
            for name, size in sizes.items()
        }
        files = {
            name: File(bytes=sizes[name], crc32=[each.result() for each in blocks]) for name, blocks in found.items()
        }
        if beside:
            beside.result()
    return files


def write(folder: Path, step: int, files: dict[str, File]) -> None:
    """Write the manifest, and sync it to disk."""
    manifest = Manifest(format=FORMAT, step=step, block=_BLOCK, files=dict(sorted(files.items())))
    write_file(folder / FILE, manifest.model_dump_json().encode())


def seal(folder: Path) -> None:
    """Write the manifest of a folder that one process wrote and that belongs to no step."""
    write(folder, 0, sums(folder, names_of(folder)))


def check(folder: Path) -> None:
    """Raise Damaged if a folder has changed since `seal`. One without a manifest, from an older version, passes."""
    try:
        manifest = read(folder, 0)
        found = faults(folder, manifest, manifest.files) if manifest else {}
    except Damaged as error:
        found = {FILE: str(error)}
    if found:
        raise Damaged(
            f"{folder} is damaged: {'; '.join(found.values())}. Delete it and start again; it is created then"
        )


def read(folder: Path, step: int) -> Manifest | None:
    """Return a folder's manifest, or None if it has none. Raises Damaged if it is invalid or of another step."""
    file = folder / FILE
    if not file.exists():
        return None
    content = read_json(file)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if manifest.format != FORMAT or manifest.step != step or manifest.block < 1 or None in manifest.files.values():
        raise Damaged(f"{FILE} is of another folder or format")
    if strange := [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise Damaged(f"{FILE} names {strange[0]!r}, which is not a file of the folder")
    return manifest


def read_json(file: Path) -> dict:
    """Return the object in a JSON file. Raises Damaged if it is missing or invalid, PipelineError if unreadable now."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise _unread(file, error) from None
    except (ValueError, RecursionError) as error:
        size = file.stat().st_size
        raise Damaged(f"{file.name} is not JSON ({size} bytes: {str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} is not a JSON object")
    return content


def faults(folder: Path, manifest: Manifest, names: Iterable[str], *, thorough: bool = True) -> dict[str, str]:
    """Return the fault of each damaged file among `names`; empty if all are as they were written.

    thorough: check checksums, not only sizes.  Raises PipelineError if a file cannot be read but may be undamaged.
    """
    blocks: list[tuple[str, int]] = []
    for name in names:
        file = manifest.files[name]
        blocks += ((name, number) for number in range(max(len(file.crc32) if file and thorough else 1, 1)))

    def checked(block: tuple[str, int]) -> str:
        name, number = block
        return _fault(folder / name, manifest.files[name], number, manifest.block, thorough)

    found: dict[str, str] = {}
    with ThreadPoolExecutor(_threads()) as pool:
        for (name, _), fault in zip(blocks, pool.map(checked, blocks), strict=True):
            if fault:
                found.setdefault(name, fault)
    return found


def _fault(file: Path, expected: File | None, number: int, block: int, thorough: bool) -> str:
    try:
        if not file.is_file():
            return f"{file.name} is not a file" if file.exists() else f"{file.name} is missing"
        if expected is None:
            return _archive_fault(file) if thorough else ""
        if (size := file.stat().st_size) != expected.bytes:
            return f"{file.name} has {size:,} bytes of {expected.bytes:,}"
        if (count := -(-size // block)) != len(expected.crc32):
            return f"{FILE} has {len(expected.crc32)} checksums of {file.name}, not {count}"
        if thorough and size and _crc32(file, number * block, block) != expected.crc32[number]:
            return f"{file.name} is not as it was written: its checksum differs from byte {number * block:,} on"
    except OSError as error:
        if isinstance(damage := _unread(file, error), Damaged):
            return str(damage)
        raise damage from None
    return ""


def _unread(file: Path, error: OSError) -> PipelineError:
    if error.errno in _DAMAGE:
        return Damaged(f"{file.name} is missing" if error.errno == errno.ENOENT else f"{file.name}: {error.strerror}")
    return PipelineError(f"{file} cannot be read: {error.strerror}; correct that and start again")


def _archive_fault(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            return f"{file.name} is damaged in {member}" if (member := archive.testzip()) else ""
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        return f"{file.name} is damaged or cut: {error}"


def _crc32(file: Path, start: int, length: int) -> int:
    buffer, crc = memoryview(bytearray(_PIECE)), 0
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while length and (count := opened.readinto(buffer[: min(length, _PIECE)])):
            crc = zlib.crc32(buffer[:count], crc)
            length -= count
    return crc


def _threads() -> int:
    return max(min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8), 1)
