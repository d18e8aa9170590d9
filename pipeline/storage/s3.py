"""S3 objects through boto3, for jobs that run for days: interrupted reads resume where they stopped.

boto3's own retries are off: they cannot resume a body, and would multiply the waits. This module repeats every request
that fails with a transient error, until there has been no progress for `Settings.timeout_s`.
"""

import hashlib
import os
import random
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import boto3.session
from botocore import exceptions as aws
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from pipeline.errors import PipelineError
from pipeline.storage.counters import RETRIES

FIRST_ANSWER_S = 10.0  # an endpoint that has never answered is more likely wrong than overloaded
MULTIPART_BYTES = 32 << 20  # objects of this size or more are uploaded in parts
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
UPLOAD_THREADS = 4
CONNECTIONS = 32  # that a process keeps: one more thread at a time would connect again for each request

T = TypeVar("T")
# Not the global generator: drawing from it would change the random numbers of a seeded run.
_jitter = random.SystemRandom()


class ObjectError(PipelineError):
    """An object cannot be read or written; the message names it and says what to do."""


@dataclass(frozen=True)
class Settings:
    """How this process accesses S3.

    timeout_s: a read or write fails after this many seconds without progress.
    requester_pays: accept the charges for access to requester-pays buckets.
    addressing: the bucket's name is in the URL's "path" or in its host ("virtual"); "auto": path except on AWS.
    """

    timeout_s: float = 120.0
    requester_pays: bool = False
    addressing: Literal["auto", "path", "virtual"] = "auto"


_settings = Settings()
_answered: set[str] = set()  # endpoints that have answered, even with an error
_client_lock = threading.Lock()
_client_threads: set[int] = set()  # native ids of the threads that used a client


def _before_fork() -> None:
    """Wait until the system has cleaned up the client threads that have ended in Python.

    During this cleanup a thread holds a lock of OpenSSL. A child forked at that moment would inherit the locked lock,
    and its first connection would hang.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        living = {thread.native_id for thread in threading.enumerate()}
        ending = {thread for thread in _client_threads - living if Path(f"/proc/self/task/{thread}").exists()}
        _client_threads.intersection_update(living | ending)
        if not ending and living == {thread.native_id for thread in threading.enumerate()}:
            return  # and no thread ended meanwhile
        time.sleep(0.001)


def _after_fork() -> None:
    global _client_lock
    _client_lock = threading.Lock()  # another thread of the parent may have held the old one
    _client_threads.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def configure(**settings: Any) -> None:
    """Set the `Settings` of this process and of the processes that it forks later."""
    global _settings
    _settings = Settings(**settings)


def server() -> str:
    """The S3 endpoint of this process."""
    return _client().meta.endpoint_url


def read(bucket: str, key: str, start: int, length: int | None, count: Callable[[int], None]) -> bytes:
    """Return `length` bytes from byte `start`, or all to the end. `count` gets the size of each chunk received.

    An interrupted body is resumed at the first missing byte, if the object has not changed.
    """
    url = f"s3://{bucket}/{key}"
    end = None if length is None else start + length
    chunks: list[bytes] = []
    position, etag = start, None
    retries = _Retries(f"{url}, bytes {start}-{'' if end is None else end - 1}")
    with _explained(url):
        while end is None or position < end:
            try:
                response, end = _get(bucket, key, position, end, etag)
                etag = response.get("ETag")
                with response["Body"] as body:
                    # read1 returns what has arrived; read would lose it if the rest of a chunk never arrives.
                    while position < end and (chunk := body.read1(min(1 << 20, end - position))):
                        chunks.append(chunk)
                        position += len(chunk)
                        count(len(chunk))
                        retries.progress()
                if position < end:
                    raise _ShortBody
            except (*_ERRORS, _ShortBody) as error:
                retries.wait(error)
    return b"".join(chunks)


def _get(bucket: str, key: str, start: int, end: int | None, etag: str | None) -> tuple[dict, int]:
    """Request bytes start..end-1 (None: to the object's end) of version `etag`. Returns the response and the end."""
    url = f"s3://{bucket}/{key}"
    wanted = {} if etag is None else {"IfMatch": etag}
    if start or end is not None:
        wanted["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    try:
        response = _client().get_object(Bucket=bucket, Key=key, **wanted)
    except aws.ClientError as error:
        if _code(error) in ("PreconditionFailed", "412"):
            raise _overwritten(url) from error
        if _code(error) in ("InvalidRange", "416"):
            check_range(url, start, end, size(bucket, key))
        raise
    if etag not in (None, response.get("ETag")):  # the server does not support If-Match
        raise _overwritten(url)
    if "Range" not in wanted:
        return response, response["ContentLength"]
    # "bytes 0-9/100"; the total shows whether the server cut the range at the object's end
    served = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.get("ContentRange", ""))
    if served is None:
        raise ObjectError(f"{url}: the server does not support ranged reads, which streaming needs: use another server")
    total = int(served[1])
    check_range(url, start, end, total)
    return response, total if end is None else end


def _overwritten(url: str) -> ObjectError:
    return ObjectError(f"{url} was overwritten while it was being read: restart when it no longer changes")


def check_range(url: str, start: int, end: int | None, total: int) -> None:
    """Raise ObjectError unless an object of `total` bytes contains bytes start..end-1 (None: to its end)."""
    if start < 0 or total < ((start + 1 if start else 0) if end is None else end):
        raise ObjectError(
            f"{url}: bytes {start}-{'' if end is None else end - 1} are out of bounds, it has {total}: "
            "if it is truncated, upload it again"
        )


def write(bucket: str, key: str, total: int, part: Callable[[int, int], bytes]) -> None:
    """Store `total` bytes. `part(start, length)` returns a range of them; several threads call it."""
    if total < MULTIPART_BYTES:
        data = part(0, total)
        _call(f"s3://{bucket}/{key}", "put_object", Bucket=bucket, Key=key, **_checked(data, _md5(data)))
    else:
        _write_parts(bucket, key, total, part)


def _write_parts(bucket: str, key: str, total: int, part: Callable[[int, int], bytes]) -> None:
    """Upload in parts, several at once."""
    url, where = f"s3://{bucket}/{key}", {"Bucket": bucket, "Key": key}
    step = max(PART_BYTES, -(-total // MAX_PARTS))
    stale: list[dict] = []
    with suppress(ObjectError):  # not every server lists uploads, and not with all credentials
        stale = _call(url, "list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", [])
    upload = {**where, "UploadId": _call(url, "create_multipart_upload", **where)["UploadId"]}

    def send(number: int) -> tuple[str, bytes]:
        """Upload a part. Returns its ETag and its MD5."""
        data = part((number - 1) * step, step)
        md5 = _md5(data)
        sent = _call(f"{url}, part {number}", "upload_part", **upload, PartNumber=number, **_checked(data, md5))
        return sent["ETag"].strip('"'), md5

    def complete() -> bool:
        """Complete the upload. False if it no longer exists, as after an earlier completion whose response was lost."""
        try:
            _client().complete_multipart_upload(**upload, MultipartUpload={"Parts": listed})
        except aws.ClientError as error:
            if _code(error) != "NoSuchUpload":
                raise
            return False
        return True

    with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
        sent = list(pool.map(send, range(1, -(-total // step) + 1)))
    listed = [{"PartNumber": number, "ETag": etag} for number, (etag, _) in enumerate(sent, 1)]
    completed = _persist(url, complete)

    # The usual ETag is the MD5 of the parts' MD5s; stores that encrypt with their own keys have other ETags.
    expected = f'"{_md5(b"".join(md5 for _, md5 in sent)).hex()}-{len(sent)}"'
    stored = _persist(url, lambda: _head(bucket, key))
    usual = all(etag == md5.hex() for etag, md5 in sent) and re.fullmatch(r'"\w{32}-\d+"', stored["ETag"])
    if stored["ContentLength"] != total or (stored["ETag"] != expected and (usual or not completed)):
        raise ObjectError(
            f"{url} differs from what was sent ({stored['ContentLength']} of {total} bytes): upload it again"
        )
    # Failed and killed uploads of this key left parts, which stores charge for.
    with suppress(ObjectError):
        for left in stale:
            if left["Key"] == key:
                _call(url, "abort_multipart_upload", **where, UploadId=left["UploadId"])


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _checked(data: bytes, md5: bytes) -> dict:
    """A request's body, and its checksum, by which the server detects damage in transit."""
    return {"Body": data, "ContentMD5": b64encode(md5).decode()}


def stamps_under(bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield every key that begins with `prefix`, and its size and ETag from the listing."""
    more: dict[str, str] | None = {}
    while more is not None:
        page = _call(f"s3://{bucket}/{prefix}", "list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        if "Name" not in page and not page.get("Contents"):  # HTML may parse as XML
            raise ObjectError(
                f"s3://{bucket}/{prefix}: the response is not from S3, but perhaps from a proxy or a login page: check "
                "AWS_ENDPOINT_URL"
            )
        yield from ((entry["Key"], f"{entry['Size']} {entry['ETag']}") for entry in page.get("Contents", []))
        more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None


def exists(bucket: str, key: str) -> bool:
    """Whether the object exists."""
    try:
        size(bucket, key)
    except ObjectError as error:
        if isinstance(error.__cause__, aws.ClientError) and _code(error.__cause__) in ("NoSuchKey", "404"):
            return False
        raise
    return True


def size(bucket: str, key: str) -> int:
    """The object's size in bytes."""
    return _persist(f"s3://{bucket}/{key}", lambda: _head(bucket, key))["ContentLength"]


def delete(bucket: str, key: str) -> None:
    """Remove the object if it exists."""
    _call(f"s3://{bucket}/{key}", "delete_object", Bucket=bucket, Key=key)


def _head(bucket: str, key: str) -> dict:
    try:
        return _client().head_object(Bucket=bucket, Key=key)
    except aws.ClientError:
        # The response to a failed HEAD has no body with a reason; that to a GET of one byte has.
        _client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        raise


class _ShortBody(Exception):
    """The body ended before the requested range did."""


# boto3's errors, and those of urllib3 and boto3's parsers that pass through it if a response is incomplete or damaged.
_ERRORS = (aws.ClientError, aws.BotoCoreError, HTTPError, ResponseParserError)


class _Retries:
    """The waits between attempts of one operation: backoff with full jitter, until there is no progress for too long.

    Full jitter: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, what: str) -> None:
        self.what, self.failures, self.moved = what, 0, time.monotonic()

    def progress(self) -> None:
        self.failures, self.moved = 0, time.monotonic()

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt. Raise `error` if it is not transient, ObjectError if the time is up."""
        reason = _transient(error)
        if reason is None:
            raise error
        self.failures += 1
        RETRIES.add(1)
        limit, idle = _settings.timeout_s, time.monotonic() - self.moved
        if _client().meta.endpoint_url not in _answered:
            limit = min(limit, FIRST_ANSWER_S)
        if idle >= limit:
            raise ObjectError(
                f"{self.what}: no progress in {idle:.0f} s and {self.failures} attempts; last error: {reason}"
            ) from error
        time.sleep(min(_jitter.uniform(0, min(10.0, 0.1 * 2 ** min(self.failures, 7))), limit - idle))


def _persist(what: str, call: Callable[[], T]) -> T:
    """Call `call` until it succeeds, and return its result. Other errors than transient ones become ObjectError."""
    retries = None
    with _explained(what):
        while True:
            try:
                return call()
            except _ERRORS as error:
                # The time starts at the first failure: sending a large part over a slow line is no delay.
                retries = retries or _Retries(what)
                retries.wait(error)


def _call(what: str, operation: str, **parameters: object) -> dict[str, Any]:
    """Call one of the client's operations, with retries."""
    return _persist(what, lambda: getattr(_client(), operation)(**parameters))


_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {  # with another status
    "BadDigest",  # damaged in transit
    "BandwidthLimitExceeded",
    "OperationAborted",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
}


def _transient(error: Exception) -> str | None:
    """The reason of an error that another attempt may not have; None for other errors."""
    if isinstance(error, aws.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status in _TRANSIENT_STATUS or _code(error) in _TRANSIENT_CODES:
            hint = "is the network failing" if _code(error) == "BadDigest" else "is it overloaded"
            return f"the server answered {status} {_code(error)}: {hint}?"
    elif isinstance(error, (aws.ConnectionError, aws.HTTPClientError)):
        endpoint = _client().meta.endpoint_url
        return f"no answer from {endpoint} ({type(error).__name__}): is the server up, is AWS_ENDPOINT_URL right?"
    elif isinstance(error, (HTTPError, ResponseParserError, _ShortBody)):
        return f"the response broke off ({type(error).__name__.lstrip('_')}): is the network failing?"
    return None


def _client() -> Any:
    """This process's S3 client. A fork, other settings or another AWS environment get a new one."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    _client_threads.add(threading.get_native_id())
    with _client_lock:
        return _make_client(os.getpid(), frozenset(environment.items()), _settings)


@lru_cache(maxsize=4)
def _make_client(pid: int, environment: frozenset[tuple[str, str]], settings: Settings) -> Any:
    options = {
        # A third of the limit: a stalled connection is replaced before the operation fails.
        "connect_timeout": min(10.0, settings.timeout_s / 3),
        "read_timeout": min(20.0, settings.timeout_s / 3),
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": CONNECTIONS,
        "tcp_keepalive": True,
        # Few servers but AWS support its newer checksums. Uploads have an MD5; resumed bodies have no checksum.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    path_style = {"s3": {"addressing_style": "path"}}
    addressing = {"auto": {}, "path": path_style, "virtual": {"s3": {"addressing_style": "virtual"}}}
    session = boto3.session.Session()  # the default session is not thread-safe
    try:
        client = session.client("s3", config=Config(**options, **addressing[settings.addressing]))
        endpoint = urlsplit(client.meta.endpoint_url)
        aws_host = (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        if settings.addressing == "auto" and not aws_host:  # other servers rarely support buckets as host names
            client = session.client("s3", config=Config(**options, **path_style))
    except ValueError as error:
        raise ObjectError("the S3 endpoint is not a URL: set AWS_ENDPOINT_URL to http(s)://host:port") from error
    if endpoint.username is not None:
        raise ObjectError("AWS_ENDPOINT_URL contains credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    client.meta.events.register("after-call.s3", lambda **_: _answered.add(client.meta.endpoint_url))
    if settings.requester_pays:
        client.meta.events.register("before-parameter-build.s3", _requester_pays)
    return client


def _requester_pays(params: dict[str, str], model: Any, **_: object) -> None:
    if "RequestPayer" in model.input_shape.members:
        params["RequestPayer"] = "requester"


def _code(error: aws.ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "unknown")


_ADVICE = {
    "NoSuchBucket": "there is no such bucket: create it, or correct the name or AWS_ENDPOINT_URL",
    "NoSuchKey": "there is no such object: correct the name, or upload it",
    "NoSuchUpload": "another program or a rule of the bucket ended this upload: upload it again",
    "SignatureDoesNotMatch": "the secret key is wrong: correct AWS_SECRET_ACCESS_KEY (or the profile's)",
    "InvalidAccessKeyId": "the server does not know the access key: correct AWS_ACCESS_KEY_ID (or the profile's)",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: have it set (chrony or ntpd)",
    "ExpiredToken": "the session token has expired: sign in again",
    "AccessDenied": "access denied: these credentials lack the permission, or the object does not exist",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION to the bucket's",
}
_ADVICE |= {"404": _ADVICE["NoSuchKey"], "403": _ADVICE["AccessDenied"], "301": _ADVICE["PermanentRedirect"]}


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn boto3's errors into an ObjectError of one line."""
    try:
        yield
    except aws.ClientError as error:
        code = _code(error)
        advice = _ADVICE.get(code or "") or _one_line(f"{code}: {error.response['Error'].get('Message', '')}")
        raise ObjectError(f"{url}: {advice}") from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        raise ObjectError(f"{url}: no usable S3 credentials ({type(error).__name__}): {advice}") from error
    except aws.BotoCoreError as error:
        raise ObjectError(f"{url}: {_one_line(str(error))}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
