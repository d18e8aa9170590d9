import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.data import objects
from pipeline.data.objects import ObjectError

ROOT = "s3://pipeline-tests/objects"


@pytest.fixture(params=["file", "s3"])
def root(request, tmp_path):
    if request.param == "file":
        return str(tmp_path)
    request.getfixturevalue("s3")
    return f"{ROOT}/{tmp_path.name}"


def message(action, *arguments) -> str:
    with pytest.raises(ObjectError) as caught:
        action(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_write_read_list(root, tmp_path):
    name = objects.join(root, "folder", "a b ü.bin")
    assert not objects.exists(name)
    objects.write(name, bytes(range(100)))
    assert objects.exists(name)
    assert objects.size(name) == 100
    assert objects.read(name) == bytes(range(100))
    assert objects.read(name, 10) == bytes(range(10, 100))
    assert objects.read(name, 10, 5) == bytes(range(10, 15))
    assert objects.read(name, 99, 1) == bytes([99])
    assert objects.read(name, 100, 0) == b""
    objects.write(name, b"")
    assert objects.read(name) == b""

    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 << 20))  # above the multipart threshold
    large = objects.join(root, "folder", "sub", "large")
    objects.write(large, source)
    assert objects.size(large) == 40 << 20
    assert objects.read(large, 17 << 20, 1000) == source.read_bytes()[17 << 20 :][:1000]
    source.unlink()

    objects.write(objects.join(root, "folder-beside", "x"), b"x")
    assert objects.list_under(objects.join(root, "folder")) == [name, large]
    assert objects.list_under(objects.join(root, "none")) == []


def test_list_is_paginated(s3):
    for number in range(1005):
        objects.write(f"{ROOT}/many/{number:04d}", b"")
    assert objects.list_under(f"{ROOT}/many/") == [f"{ROOT}/many/{number:04d}" for number in range(1005)]


def test_out_of_bounds_and_missing(root, tmp_path):
    name = objects.join(root, "short")
    objects.write(name, bytes(100))
    for start, length in ((90, 11), (100, 1), (200, 5), (100, None)):
        assert "out of bounds, it has 100" in message(objects.read, name, start, length)
    missing = objects.join(root, "missing")
    for action in (objects.read, objects.size):
        text = message(action, missing)
        assert missing in text
        assert "there is no such" in text
    assert "there is no such file" in message(objects.write, name, tmp_path / "no-source")


def test_write_is_whole_or_absent(tmp_path, monkeypatch):
    name = tmp_path / "object"
    name.write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "No space left" in message(objects.write, str(name), b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({}, "s3://no-such-bucket/key", "there is no such bucket"),
        ({}, f"{ROOT}/no-such-key", "there is no such object"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, f"{ROOT}/key", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "unknown-key"}, f"{ROOT}/key", "AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "no-such-profile"}, f"{ROOT}/key", "no-such-profile"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "2"},
            f"{ROOT}/key",
            "no answer from http://127.0.0.1:9",
        ),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, f"{ROOT}/key", "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:9"}, f"{ROOT}/key", "AWS_ENDPOINT_URL"),
        ({}, "s3://me:hidden@bucket/key", "credentials"),
        ({}, "s3://me:hid/hidden@bucket/key", "credentials"),
        ({}, "https://host/key?signature=hidden", "neither"),
        ({}, "s3://", "lacks a bucket"),
        ({}, "s3://bucket", "lacks a key"),
    ],
)
def test_one_clear_error(s3, monkeypatch, environment, url, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    for action in (objects.read, objects.size):
        text = message(action, url)
        assert expected in text
        for secret in ("hidden", "wrong-secret", s3.environment()["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in text
    assert time.monotonic() - began < 10
    if expected != "there is no such object":
        assert expected in message(objects.exists, url)
    if not expected.startswith("there is no such"):  # this server creates a bucket that is written to
        assert expected in message(objects.write, url, b"data")


def test_no_credentials(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "AWS_ACCESS_KEY_ID" in message(objects.read, f"{ROOT}/key")


def test_a_forked_child_reads(s3):
    objects.write(f"{ROOT}/forked", b"data")
    parent = objects._client()
    child = os.fork()
    if child == 0:
        os._exit(0 if objects.read(f"{ROOT}/forked") == b"data" and objects._client() is not parent else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert objects._client() is parent


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("broken", [2, 99])
def test_short_bodies_are_read_again(s3, monkeypatch, broken, announced):
    """A server that cuts its first `broken` bodies short, and says so in Content-Length or breaks off."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.headers["Range"])
            body = b"0123456789"[: 4 if len(requests) <= broken else 10]
            self.send_response(206)
            self.send_header("Content-Range", "bytes 10-19/100")
            self.send_header("Content-Length", str(len(body) if announced else 10))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(objects, "READ_ATTEMPTS", 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        if broken < 3:
            assert objects.read("s3://bucket/key", 10, 10) == b"0123456789"
        else:
            assert "3 times in a row" in message(objects.read, "s3://bucket/key", 10, 10)
        server.shutdown()
    assert requests == ["bytes=10-19"] * 3
