"""Objects by URL: `s3://bucket/key` through boto3, anything without a scheme as a path.

Endpoint, region and credentials come from where AWS's own tools look: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.aws, roles. Every wait has a limit, every failure is one
`ObjectError` that names the object and says what to do, and no message repeats a secret.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config

from pipeline.errors import PipelineError

READ_ATTEMPTS = 5
_MULTIPART = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=16 << 20, max_concurrency=4)
# A generator of its own: drawing from the global one would change what a seeded run draws next.
_jitter = random.SystemRandom()


class ObjectError(PipelineError):
    """An object cannot be read or written as asked; the message names it and says what to do."""


class _BodyError(Exception):
    """A body that did not arrive whole, which another attempt may mend."""


def read(url: str, start: int = 0, length: int | None = None) -> bytes:
    """The `length` bytes from byte `start` on; without `length`, all bytes from there to the end.

    Raises ObjectError when the object is missing, unreachable or refused, when it ends before
    start + length, and when no attempt of READ_ATTEMPTS brought the whole range.
    """
    if length == 0:
        return b""
    location = _s3_location(url)
    if location is None:
        with _explained(url), Path(url).open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            _check_range(url, start, length, total)
            file.seek(start)
            return file.read(total - start if length is None else length)
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(_jitter.uniform(0.1, min(20.0, 0.5 * 2**attempt)))
        try:
            return _read_s3_once(url, *location, start, length)
        except _BodyError as error:
            reason = str(error)
    raise ObjectError(f"{url}: {reason}, {READ_ATTEMPTS} times in a row: is the network failing?")


def _read_s3_once(url: str, bucket: str, key: str, start: int, length: int | None) -> bytes:
    wanted = {}
    if start or length is not None:
        wanted["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
    with _explained(url):
        try:
            response = _client().get_object(Bucket=bucket, Key=key, **wanted)
        except aws.ClientError as error:
            if _code(error) in ("InvalidRange", "416"):
                _check_range(url, start, length, size(url))
            raise
        if wanted:  # "bytes 0-9/100"; a server that cut the range to the object's end says so here
            _, _, total = response.get("ContentRange", "").rpartition("/")
            if not total.isdigit():
                raise ObjectError(f"{url}: the server ignores byte ranges, which streaming needs")
            _check_range(url, start, length, int(total))
            expected = int(total) - start if length is None else length
        else:
            expected = response["ContentLength"]
        try:
            data = response["Body"].read()
        except (aws.IncompleteReadError, aws.HTTPClientError) as error:
            raise _BodyError(f"the body broke off ({type(error).__name__})") from error
    if len(data) != expected:
        raise _BodyError(f"{len(data)} bytes came where {expected} were asked for")
    return data


def write(url: str, data: bytes | Path) -> None:
    """Store bytes, or the content of the file `data`. Readers see the old object or the whole new one."""
    location = _s3_location(url)
    with _explained(url), data.open("rb") if isinstance(data, Path) else BytesIO(data) as source:
        if location is None:
            target = Path(url)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            try:
                with partial.open("wb") as file:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
                partial.replace(target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        elif isinstance(data, bytes) and len(data) < _MULTIPART.multipart_threshold:
            _client().put_object(Bucket=location[0], Key=location[1], Body=data)
        else:
            _client().upload_fileobj(source, *location, Config=_MULTIPART)


def list_under(url: str) -> list[str]:
    """Full URLs of all objects below a folder (a prefix up to a slash), sorted; [] if there are none."""
    location = _s3_location(url, key_needed=False)
    if location is None:
        with _explained(url):
            return sorted(str(path) for path in Path(url).rglob("*") if path.is_file())
    bucket, key = location
    prefix = key.rstrip("/") + "/" if key else ""
    with _explained(url):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return sorted(f"s3://{bucket}/{key}" for key in keys if not key.endswith("/"))


def exists(url: str) -> bool:
    """Whether there is such an object. A missing bucket or a refusal is an ObjectError, not a no."""
    location = _s3_location(url)
    if location is None:
        return Path(url).is_file()
    with _explained(url):
        try:
            _head(*location)
        except aws.ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return False
            raise
    return True


def size(url: str) -> int:
    """The object's size in bytes."""
    location = _s3_location(url)
    with _explained(url):
        return Path(url).stat().st_size if location is None else _head(*location)["ContentLength"]


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


def _check_range(url: str, start: int, length: int | None, total: int) -> None:
    end = start + 1 if length is None and start else start + (length or 0)
    if start < 0 or end > total:
        raise ObjectError(
            f"{url}: bytes {start}-{'' if length is None else end - 1} are out of bounds, it has {total}: "
            "if it was cut short, upload it again"
        )


def _client():
    """This process's S3 client: after a fork, and when the AWS environment changes, a new one."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _make_client(os.getpid(), frozenset(environment.items()))


@lru_cache(maxsize=4)
def _make_client(pid: int, environment: frozenset[tuple[str, str]]):
    names = {name for name, _ in environment}
    retries = {} if "AWS_RETRY_MODE" in names else {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in names:
        retries["total_max_attempts"] = 6
    options = {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": retries,
        "max_pool_connections": 16,
        "tcp_keepalive": True,
    }
    session = boto3.session.Session()  # the default session is not safe to share between threads
    try:
        client = session.client("s3", config=Config(**options))
        endpoint = urlsplit(client.meta.endpoint_url)
        if (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return client
        # Other servers: buckets are rarely host names there, and few know AWS's newer upload checksums.
        compatible = {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        client = session.client("s3", config=Config(**options, **compatible))
    except ValueError as error:
        raise ObjectError("the S3 endpoint is no URL: set AWS_ENDPOINT_URL to http(s)://host:port") from error
    if endpoint.username is not None:
        raise ObjectError("AWS_ENDPOINT_URL carries credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return client


def _head(bucket: str, key: str) -> dict:
    try:
        return _client().head_object(Bucket=bucket, Key=key)
    except aws.ClientError:
        # A refused HEAD has no body to say why; a GET of one byte has.
        _client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        raise


def _code(error: aws.ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "unknown")


_ADVICE = {
    "NoSuchBucket": "there is no such bucket: create it, or correct the name or AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such object: correct the name, or upload it",
    "SignatureDoesNotMatch": "the secret key is wrong: correct AWS_SECRET_ACCESS_KEY (or the profile's)",
    "InvalidAccessKeyId": "the access key is unknown there: correct AWS_ACCESS_KEY_ID (or the profile's)",
    "ExpiredToken": "the session token has expired: sign in again",
    "AccessDenied": "access denied: these credentials may not do this here, or there is no such object",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION to the bucket's",
}
_ADVICE |= {"404": _ADVICE["NoSuchKey"], "403": _ADVICE["AccessDenied"], "301": _ADVICE["PermanentRedirect"]}


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what boto3 and the file system raise into an ObjectError of one line."""
    try:
        yield
    except aws.ClientError as error:
        code = _code(error)
        advice = _ADVICE.get(code) or _one_line(f"{code}: {error.response['Error'].get('Message', '')}")
        raise ObjectError(f"{url}: {advice}") from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise ObjectError(f"{url}: no usable S3 credentials ({type(error).__name__}): {advice}") from error
    except (aws.ConnectionError, aws.HTTPClientError) as error:
        endpoint = _client().meta.endpoint_url
        raise ObjectError(
            f"{url}: no answer from {endpoint} ({type(error).__name__}): is it up, is AWS_ENDPOINT_URL right?"
        ) from error
    except (aws.BotoCoreError, Boto3Error) as error:
        raise ObjectError(f"{url}: {_one_line(str(error))}") from error
    except FileNotFoundError as error:
        raise ObjectError(f"{error.filename or url}: there is no such file") from error
    except OSError as error:
        raise ObjectError(f"{error.filename or url}: {error.strerror or _one_line(str(error))}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
