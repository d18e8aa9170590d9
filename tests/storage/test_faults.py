"""Reads and writes of a real S3 server through a proxy that breaks connections as planned."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from pipeline.storage import objects
from pipeline.storage import s3 as client
from pipeline.storage.objects import ObjectError
from tests.integration.fault_proxy import FLIP, RESET, TRUNCATE, UNAVAILABLE, Fault, FaultProxy, refuse, stall
from tools.s3_server import free_ports

ROOT = "s3://pipeline-tests/faults"
OBJECT = f"{ROOT}/object"
PATH = "/pipeline-tests/faults/object"
CONTENT = os.urandom(1 << 20)
LARGE = client.MULTIPART_BYTES + 12345  # bytes, three parts


@pytest.fixture
def proxied(s3, monkeypatch):
    """Return a function that starts a proxy with a plan and points this process to it."""
    objects.write(OBJECT, CONTENT)
    started = []

    def start(faults) -> FaultProxy:
        started.append(FaultProxy(s3.endpoint, faults).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", started[-1].endpoint)
        return started[-1]

    yield start
    for each in started:
        each.__exit__()


def only(method: str, numbers: range, fault: Fault):
    """Return a plan that gives the fault to requests with this method and these numbers."""
    return lambda number, asked, path: fault if asked == method and number in numbers else None


def message(action, *arguments) -> str:
    with pytest.raises(ObjectError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unfinished(key: str) -> list[str]:
    """Return the keys of unfinished multipart uploads."""
    listed = client._client().list_multipart_uploads(Bucket="pipeline-tests", Prefix=key)
    return [entry["Key"] for entry in listed.get("Uploads", [])]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "length"), [(0, None), (1000, None), (77, 1_000_000)])
@pytest.mark.parametrize("fault", [RESET, TRUNCATE, UNAVAILABLE], ids=lambda fault: fault.kind)
def test_broken_read_resumes_at_the_break(proxied, fault, start, length):
    proxy = proxied(only("GET", range(3), fault))
    before, retries = objects.bytes_received(), objects.retries()
    data = objects.read(OBJECT, start, length)
    assert objects.retries() - retries == 3
    assert data == CONTENT[start:][:length]
    assert objects.bytes_received() - before == len(data) == proxy.body_bytes[PATH]
    assert proxy.requests == [("GET", PATH)] * 4


@pytest.mark.parametrize(
    "fault",
    [refuse(*answer) for answer in ((429, "TooManyRequests"), (500, "InternalError"), (400, "RequestTimeout"))],
    ids=lambda fault: fault.kind,
)
def test_transient_error_is_retried(proxied, fault):
    proxied(lambda number, method, path: fault if number == 0 else None)
    assert objects.exists(OBJECT)
    assert objects.list_under(ROOT) == [OBJECT]
    objects.write(OBJECT, CONTENT)
    assert objects.read(OBJECT) == CONTENT
    objects.delete(OBJECT)
    assert not objects.exists(OBJECT)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [RESET, TRUNCATE], ids=lambda fault: fault.kind)
def test_truncated_response_is_requested_again(proxied, fault):
    for action, answer in ((objects.list_under, [OBJECT]), (objects.exists, False)):
        proxied(only("GET", range(2), fault))
        assert action(ROOT) == answer  # S3 reports a missing object in a body


def test_permanent_error_is_not_retried(proxied):
    proxy = proxied(lambda number, method, path: refuse(403, "AccessDenied"))
    for action in (objects.read, objects.delete):
        assert "access denied" in message(action, OBJECT)
    assert proxy.requests == [("GET", PATH), ("DELETE", PATH)]


@pytest.mark.slow
def test_progress_extends_the_timeout(proxied):
    objects.configure(timeout_s=6)  # even a loaded machine answers in a third of it
    proxied(only("GET", range(4), stall(60)))  # four timeouts of 2 s; each attempt receives half of the rest
    before = objects.bytes_received()
    assert objects.read(OBJECT) == CONTENT
    assert objects.bytes_received() - before == len(CONTENT)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "reason"), [(stall(60), "ReadTimeoutError"), (UNAVAILABLE, "503 SlowDown")])
def test_no_progress_raises_after_the_timeout(proxied, fault, reason):
    objects.configure(timeout_s=3)
    proxied(lambda number, method, path: fault)
    began = time.monotonic()
    text = message(objects.read, OBJECT, 1000, 2)  # of two bytes, the first attempt receives one and the others none
    assert time.monotonic() - began >= 3
    for part in (f"{OBJECT}, bytes 1000-1001: no progress in ", reason):
        assert part in text


@pytest.mark.slow
def test_size_and_write_raise_on_persistent_error(proxied):
    objects.configure(timeout_s=3)
    proxied(lambda number, method, path: UNAVAILABLE)
    assert "503" in message(objects.size, OBJECT)
    assert "503 SlowDown" in message(objects.write, OBJECT, b"data")


def test_endpoint_that_never_answered_raises(s3, monkeypatch):
    monkeypatch.setattr(client, "FIRST_ANSWER_S", 0.5)
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for action in (objects.read, objects.size):
        began = time.monotonic()
        assert f"no answer from {endpoint}" in message(action, OBJECT)
        assert time.monotonic() - began >= 0.5


@pytest.mark.slow
def test_read_waits_for_server_to_return(s3, monkeypatch):
    monkeypatch.setattr(client, "FIRST_ANSWER_S", 0.1)
    objects.write(OBJECT, CONTENT)
    port = free_ports(1)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    back = []
    with FaultProxy(s3.endpoint, port=port):
        assert objects.size(OBJECT) == len(CONTENT)
    timer = threading.Timer(1, lambda: back.append(FaultProxy(s3.endpoint, port=port).__enter__()))
    timer.start()
    try:
        assert objects.read(OBJECT) == CONTENT
    finally:
        timer.join()
        back[0].__exit__()
    assert back[0].requests == [("GET", PATH)]


@pytest.mark.slow
def test_fault_proxy_answers_502_without_its_server(monkeypatch):
    with FaultProxy(f"http://127.0.0.1:{free_ports(1)[0]}") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        objects.configure(timeout_s=3)
        assert "502 BadGateway" in message(objects.read, OBJECT)


@pytest.mark.parametrize("replacement", [CONTENT[::-1], CONTENT[:1000]], ids=["same size", "shorter"])
def test_object_overwritten_during_read_raises(s3, proxied, replacement):
    def plan(number: int, method: str, path: str) -> Fault | None:
        if number == 0:
            return TRUNCATE
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
            objects.write(OBJECT, replacement)
        return None

    proxied(plan)
    assert f"{OBJECT} was overwritten while it was being read" in message(objects.read, OBJECT)


def _read_pieces(count: int) -> tuple[bool, int]:
    """Read pieces in 4 threads; return whether all are right, and the number of received bytes."""
    spans = [(number * 7919, 20_000) for number in range(count)]
    with ThreadPoolExecutor(4) as pool:
        pieces = pool.map(lambda span: objects.read(OBJECT, *span), spans)
        right = all(piece == CONTENT[start:][:length] for piece, (start, length) in zip(pieces, spans, strict=True))
    return right, objects.bytes_received()


@pytest.mark.slow
def test_threads_in_forked_processes_survive_faults(proxied):
    def plan(number: int, method: str, path: str) -> Fault | None:
        return (RESET, TRUNCATE, UNAVAILABLE, None)[number % 4]

    proxy = proxied(plan)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as processes:
        for right, received in processes.map(_read_pieces, [12, 12]):
            assert right
            assert received % (12 * 20_000) == 0  # one process may have run both
    assert proxy.body_bytes[PATH] == 2 * 12 * 20_000


@pytest.mark.parametrize("size", [1000, LARGE], ids=["whole", "in parts"])
def test_body_damaged_in_transit_is_sent_again(proxied, size):
    data = os.urandom(size)
    proxy = proxied(only("PUT", range(1), FLIP))
    objects.write(OBJECT, data)
    assert objects.read(OBJECT) == data
    assert proxy.count("PUT") == (2 if size == 1000 else 4)


@pytest.mark.slow
def test_body_damaged_on_every_attempt_is_refused(proxied):
    objects.configure(timeout_s=3)
    proxied(lambda number, method, path: FLIP if method == "PUT" else None)
    assert "BadDigest" in message(objects.write, OBJECT, b"other")
    assert objects.read(OBJECT) == CONTENT


def test_stale_uploads_of_the_same_key_are_removed(proxied):
    key, data = "faults/stale", os.urandom(LARGE)
    for name, body in ((key, b"other content"), (key, None), (key + "-beside", None)):
        where = {"Bucket": "pipeline-tests", "Key": name}
        upload = client._client().create_multipart_upload(**where)["UploadId"]
        if body is not None:
            client._client().upload_part(**where, UploadId=upload, PartNumber=1, Body=body)
    proxy = proxied(lambda number, method, path: None)
    objects.write(f"{ROOT}/stale", data)
    assert proxy.count("POST") == 2  # one to start a new upload and one to complete it
    assert objects.read(f"{ROOT}/stale") == data
    assert unfinished(key) == [key + "-beside"]


@pytest.mark.slow
def test_a_failed_upload_is_removed_by_the_next(proxied):
    url, data = f"{ROOT}/failed", os.urandom(LARGE)
    proxied(lambda number, method, path: refuse(403, "AccessDenied") if "partNumber=2" in path else None)
    assert f"{url}, part 2: access denied" in message(objects.write, url, data)
    assert unfinished("faults/failed")
    proxied(lambda number, method, path: None)
    objects.write(url, data)
    assert objects.read(url) == data
    assert unfinished("faults/failed") == []


def test_write_works_without_listing_uploads(proxied):
    data = os.urandom(LARGE)
    proxied(only("GET", range(1), refuse(501, "NotImplemented")))
    objects.write(f"{ROOT}/unlisted", data)
    assert objects.read(f"{ROOT}/unlisted") == data


@pytest.mark.slow
def test_lost_completion_response_is_checked_against_object(proxied):
    """The next attempt finds no upload, and the object itself shows whether the first one succeeded."""
    data = os.urandom(LARGE)
    plan = {1: RESET, 2: refuse(404, "NoSuchUpload")}
    proxy = proxied(lambda number, method, path: plan.get(number) if method == "POST" else None)
    objects.write(OBJECT, data)
    assert proxy.count("POST") == 3
    assert objects.read(OBJECT) == data

    proxied(only("POST", range(1, 2), refuse(404, "NoSuchUpload")))
    assert "differs from what was sent" in message(objects.write, OBJECT, data[::-1])
    assert objects.read(OBJECT) == data


def test_write_raises_if_object_differs_from_sent_data(s3):
    with pytest.raises(ObjectError, match="differs from what was sent"):
        client.write("pipeline-tests", "faults/short", LARGE, lambda start, length: bytes(length - 1))
