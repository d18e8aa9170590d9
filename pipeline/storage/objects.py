"""Objects by URL: `s3://bucket/key`, and anything without a scheme as a path.

Endpoint, region and credentials come from where AWS's own tools look: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws, roles. Every wait has a limit, every failure is one
`ObjectError` that names the object and says what to do, and no message repeats a secret.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage import s3
from pipeline.storage.s3 import ObjectError, Settings, check_range, configure, server, settings

__all__ = [
    "ObjectError",
    "Settings",
    "bytes_received",
    "configure",
    "delete",
    "exists",
    "join",
    "list_under",
    "read",
    "server",
    "settings",
    "size",
    "stamps",
    "write",
]


class _Counter:
    """A count that threads share. A forked child begins at zero, with a lock that nobody holds."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.value, self._lock = 0, threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.value += number


_received = _Counter()


def bytes_received() -> int:
    """How many bytes `read` has brought to this process so far, those of failed reads included."""
    return _received.value


def read(url: str, start: int = 0, length: int | None = None) -> bytes:
    """The `length` bytes from byte `start` on; without `length`, all bytes from there to the end.

    A connection that breaks is made anew, and goes on at the first missing byte. Raises ObjectError when the object
    is missing, refused, or overwritten meanwhile, when it ends before start + length, and when no byte came for
    `timeout_s` (of an endpoint that never answered: s3.FIRST_ANSWER_S at most).
    """
    if length == 0:
        return b""
    location = _s3_location(url)
    if location is not None:
        return s3.read(*location, start, length, _received.add)
    with _explained(url), Path(url).open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        check_range(url, start, None if length is None else start + length, total)
        file.seek(start)
        data = file.read(total - start if length is None else length)
    _received.add(len(data))
    return data


def write(url: str, data: bytes | Path) -> None:
    """Store bytes, or the content of the file `data`. Readers see the old object or the whole new one.

    On S3 a large object goes up in parts. If that fails, or the process is killed, the finished parts stay on the
    server for the next `write` of the same content, which sends the others; nothing is left over after a success.
    Raises ObjectError as `read` does, and when the object that was stored is not the one that was sent.
    """
    location = _s3_location(url)
    with _explained(url):
        if location is None:
            _write_file(Path(url), data)
        elif isinstance(data, bytes):
            s3.write(*location, len(data), lambda start, length: data[start : start + length])
        else:
            with data.open("rb") as file:
                number = file.fileno()
                s3.write(*location, os.fstat(number).st_size, lambda start, length: os.pread(number, length, start))


def _write_file(target: Path, data: bytes | Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if isinstance(data, bytes):
            partial.write_bytes(data)
        else:
            shutil.copyfile(data, partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def delete(url: str) -> None:
    """Remove the object; it is no error if there is none."""
    location = _s3_location(url)
    with _explained(url):
        if location is None:
            Path(url).unlink(missing_ok=True)
        else:
            s3.delete(*location)


def list_under(url: str) -> list[str]:
    """Full URLs of all objects below a folder (a prefix up to a slash), sorted; [] if there are none."""
    return list(stamps(url))


def stamps(url: str) -> dict[str, str]:
    """Full URL -> stamp of all objects below a folder, sorted; {} if there are none.

    A stamp changes when its object does: a file's size and time of modification, on S3 its size and ETag, which
    the listing has: no object is asked for. Links to folders are followed, but not back to where they are in.
    """
    location = _s3_location(url, key_needed=False)
    if location is None:
        with _explained(url):
            return dict(sorted((str(path), stamp) for path, stamp in _file_stamps(Path(url))))
    bucket, key = location
    prefix = key.rstrip("/") + "/" if key else ""
    listed = s3.stamps_under(bucket, prefix)
    return dict(sorted((f"s3://{bucket}/{key}", stamp) for key, stamp in listed if not key.endswith("/")))


def _file_stamps(folder: Path) -> Iterator[tuple[Path, str]]:
    for name, folders, files in os.walk(folder, followlinks=True):
        place = Path(name)
        above = place.resolve()
        folders[:] = [each for each in folders if not above.is_relative_to((place / each).resolve())]
        for path in (place / file for file in files):
            with suppress(FileNotFoundError):  # removed or renamed since
                if path.is_file():
                    found = path.stat()
                    yield path, f"{found.st_size} {found.st_mtime_ns}"


def exists(url: str) -> bool:
    """Whether there is such an object. A missing bucket or a refusal is an ObjectError, not a no."""
    location = _s3_location(url)
    if location is not None:
        return s3.exists(*location)
    with _explained(url):
        return Path(url).is_file()


def size(url: str) -> int:
    """The object's size in bytes."""
    location = _s3_location(url)
    with _explained(url):
        return Path(url).stat().st_size if location is None else s3.size(*location)


def join(url: str, *parts: str) -> str:
    """The URL of `parts` below `url`."""
    _s3_location(url, key_needed=False)
    return "/".join([url.rstrip("/"), *parts])


def _s3_location(url: str, key_needed: bool = True) -> tuple[str, str] | None:
    """(bucket, key) of an S3 URL, None for a path. No message here repeats what may be a secret."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return None
    host = rest.partition("/")[0]
    if "@" in host or ":" in host:
        raise ObjectError(
            f"the {scheme}:// URL carries credentials or a port (not repeated): write s3://bucket/key, and "
            "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if scheme != "s3":
        raise ObjectError(f"{scheme}:// is neither s3://bucket/key nor a path")
    bucket, _, key = rest.partition("/")
    if not bucket or (key_needed and not key):
        raise ObjectError(f"{url} lacks a {'key' if bucket else 'bucket'}: write s3://bucket/key")
    return bucket, key


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what the file system raises into an ObjectError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectError(f"{error.filename or url}: there is no such file") from error
    except OSError as error:
        raise ObjectError(f"{error.filename or url}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in its name
        raise ObjectError(f"{url!r}: {error}: correct the name") from error
