"""Read and write objects by URL: `s3://bucket/key`, or a path without a scheme.

The S3 endpoint, region and credentials come from the usual places of AWS's tools: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_PROFILE, ~/.aws, roles. Every wait has a time limit. Every failure is an `ObjectError` that names the object and
says what to do; no message contains a secret.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage import s3
from pipeline.storage.atomic import replacing
from pipeline.storage.counters import RECEIVED, RETRIES
from pipeline.storage.s3 import CONNECTIONS as CONNECTIONS
from pipeline.storage.s3 import ObjectError, check_range
from pipeline.storage.s3 import configure as configure
from pipeline.storage.s3 import server as server

_PART = 16 << 20  # bytes that `sha256` reads at a time


def bytes_received() -> int:
    """The number of bytes that this process has received through `read`, failed reads included."""
    return RECEIVED.value


def retries() -> int:
    """How often this process repeated a request to S3."""
    return RETRIES.value


def read(url: str, start: int = 0, length: int | None = None) -> bytes:
    """Return `length` bytes from byte `start`; without `length`, all bytes from there to the end.

    A broken connection is reopened at the first missing byte. Raises ObjectError if the object is missing, forbidden or
    overwritten during the read, if it ends before start + length, or if no byte arrives for `timeout_s` (at most
    s3.FIRST_ANSWER_S for an endpoint that has never answered).
    """
    if length == 0:
        return b""
    location = _s3_location(url)
    if location is not None:
        return s3.read(*location, start, length, RECEIVED.add)
    with _explained(url), Path(url).open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        check_range(url, start, None if length is None else start + length, total)
        file.seek(start)
        data = file.read(total - start if length is None else length)
    RECEIVED.add(len(data))
    return data


def write(url: str, data: bytes | Path) -> None:
    """Store bytes, or the content of the file `data`. Readers see the old object or the whole new one.

    Large S3 objects are uploaded in parts. Raises ObjectError as `read` does, and if the stored object differs from
    what was sent.
    """
    location = _s3_location(url)
    with _explained(url):
        if location is None:
            with replacing(Path(url), durable=False) as partial:
                if isinstance(data, bytes):
                    partial.write_bytes(data)
                else:
                    shutil.copyfile(data, partial)
        elif isinstance(data, bytes):
            s3.write(*location, len(data), lambda start, length: data[start : start + length])
        else:
            with data.open("rb") as file:
                number = file.fileno()
                s3.write(*location, os.fstat(number).st_size, lambda start, length: os.pread(number, length, start))


def delete(url: str) -> None:
    """Remove the object if it exists."""
    location = _s3_location(url)
    with _explained(url):
        if location is None:
            Path(url).unlink(missing_ok=True)
        else:
            s3.delete(*location)


def list_under(url: str) -> list[str]:
    """The full URLs of all objects below a folder (on S3, a prefix that ends at a slash), sorted."""
    return list(stamps(url))


def stamps(url: str) -> dict[str, str]:
    """Map the full URL of every object below a folder to its stamp, sorted by URL.

    A stamp changes when its object changes: it is a file's size and modification time, or an S3 object's size and ETag.
    On S3 only the listing is requested. Links to folders are followed, except links to a parent folder.
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
            with suppress(FileNotFoundError):  # removed or renamed meanwhile
                if path.is_file():
                    found = path.stat()
                    yield path, f"{found.st_size} {found.st_mtime_ns}"


def exists(url: str) -> bool:
    """Whether the object exists. A missing bucket or denied access raises ObjectError."""
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


def sha256(url: str) -> str:
    """Return the SHA-256 (hex) of the object, read in parts."""
    digest, whole = hashlib.sha256(), size(url)
    for start in range(0, whole, _PART):
        digest.update(read(url, start, min(_PART, whole - start)))
    return digest.hexdigest()


def join(url: str, *parts: str) -> str:
    """The URL of `parts` below `url`."""
    _s3_location(url, key_needed=False)
    return "/".join([url.rstrip("/"), *parts])


def _s3_location(url: str, key_needed: bool = True) -> tuple[str, str] | None:
    """Return (bucket, key) of an S3 URL, or None for a path. Error messages never contain a possible secret."""
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
        raise ObjectError(f"{url} has no {'key' if bucket else 'bucket'}: write s3://bucket/key")
    return bucket, key


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the file system into an ObjectError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectError(f"{error.filename or url}: there is no such file") from error
    except OSError as error:
        raise ObjectError(f"{error.filename or url}: {error.strerror or error}") from error
    except ValueError as error:  # the name contains a NUL
        raise ObjectError(f"{url!r}: {error}: correct the name") from error
