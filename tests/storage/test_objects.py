import os
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.data.index import Index
from pipeline.storage import objects
from pipeline.storage import s3 as client
from pipeline.storage.objects import ObjectError

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


@pytest.mark.slow
def test_write_read_list_and_delete(root, tmp_path):
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
    objects.write(large, bytes(40 << 20))
    assert objects.read(large) == bytes(40 << 20)

    objects.write(objects.join(root, "folder-beside", "x"), b"x")
    assert objects.list_under(objects.join(root, "folder")) == [name, large]
    assert objects.list_under(objects.join(root, "none")) == []
    for _ in range(2):  # the second call finds nothing to delete
        objects.delete(large)
        assert not objects.exists(large)
    assert objects.exists(name)


def test_stamps_change_with_their_objects(root, monkeypatch):
    names = [objects.join(root, name) for name in ("a", "folder/b", "folder/c")]
    for name in names:
        objects.write(name, b"old")
    monkeypatch.setattr(client, "_head", None)  # the listing suffices
    before = objects.stamps(root)
    assert list(before) == names
    assert objects.stamps(f"{root}/") == before
    objects.write(names[1], b"new")
    after = objects.stamps(root)
    assert [name for name in names if before[name] != after[name]] == [names[1]]
    assert objects.stamps(objects.join(root, "none")) == {}


def test_stamps_follow_links(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a").write_bytes(b"a")
    (tmp_path / "set/deeper").mkdir(parents=True)
    (tmp_path / "set/linked").symlink_to(tmp_path / "images")
    (tmp_path / "set/deeper/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/gone").symlink_to(tmp_path / "none")
    assert list(objects.stamps(str(tmp_path / "set"))) == [str(tmp_path / "set/linked/a")]


def test_bytes_received_counts_read_bytes_only(root):
    name = objects.join(root, "counted")
    objects.write(name, bytes(1000))
    before = objects.bytes_received()
    objects.read(name)
    objects.read(name, 10, 5)
    objects.size(name)
    assert objects.bytes_received() - before == 1005


@pytest.mark.slow
def test_list_is_paginated(s3):
    for number in range(1005):
        objects.write(f"{ROOT}/many/{number:04d}", b"")
    assert objects.list_under(f"{ROOT}/many/") == [f"{ROOT}/many/{number:04d}" for number in range(1005)]


def test_out_of_bounds_and_missing_reads_raise(root, tmp_path):
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
    assert "null byte: correct the name" in message(objects.read, str(tmp_path / "a\0b"))


def test_failed_write_preserves_old_object(tmp_path, monkeypatch):
    name = tmp_path / "object"
    name.write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "No space left" in message(objects.write, str(name), b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({}, "s3://no-such-bucket/key", "there is no such bucket"),
        ({}, f"{ROOT}/no-such-key", "there is no such object"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, f"{ROOT}/key", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "unknown-key"}, f"{ROOT}/key", "AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "no-such-profile"}, f"{ROOT}/key", "no-such-profile"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            f"{ROOT}/key",
            "no answer from http://127.0.0.1:9",
        ),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, f"{ROOT}/key", "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://me:hidden@127.0.0.1:9"}, f"{ROOT}/key", "AWS_ENDPOINT_URL"),
        ({}, "s3://me:hidden@bucket/key", "credentials"),
        ({}, "s3://me:hid/hidden@bucket/key", "credentials"),
        ({}, "https://host/key?signature=hidden", "neither"),
        ({}, "s3://", "has no bucket"),
        ({}, "s3://bucket", "has no key"),
    ],
)
def test_misconfiguration_raises_clear_error_without_secrets(s3, monkeypatch, environment, url, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "FIRST_ANSWER_S", 0.5)
    for action in (objects.read, objects.size):
        text = message(action, url)
        assert expected in text
        for secret in ("hidden", "wrong-secret", s3.environment()["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in text
    if expected != "there is no such object":
        assert expected in message(objects.exists, url)
    if not expected.startswith("there is no such"):  # this server creates a missing bucket on writes
        assert expected in message(objects.write, url, b"data")


def test_missing_credentials_error_names_the_variable(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "AWS_ACCESS_KEY_ID" in message(objects.read, f"{ROOT}/key")


@pytest.mark.slow
def test_forked_child_reads_with_its_own_client(s3):
    objects.write(f"{ROOT}/forked", b"data")
    objects.read(f"{ROOT}/forked")
    parent = client._client()
    child = os.fork()
    if child == 0:
        right = objects.read(f"{ROOT}/forked") == b"data" and client._client() is not parent
        os._exit(0 if right and objects.bytes_received() == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client._client() is parent


def test_configure_replaces_all_settings():
    assert asdict(client._settings) == {"timeout_s": 120.0, "requester_pays": False, "addressing": "auto"}
    objects.configure(timeout_s=5, requester_pays=True, addressing="path")
    changed = client._settings
    objects.configure(addressing="virtual")
    assert client._settings == client.Settings(120.0, False, "virtual")
    objects.configure(**asdict(changed))
    assert client._settings == changed


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False])
def test_requester_pays_header_is_sent_with_every_operation(s3, pays):
    objects.configure(requester_pays=pays)
    sent = {}

    def note(request, event_name, **_):
        sent[event_name.rpartition(".")[2]] = request.headers.get("x-amz-request-payer")

    client._client().meta.events.register("before-send.s3", note)
    url = f"{ROOT}/requester-pays"
    stale = client._client().create_multipart_upload(Bucket="pipeline-tests", Key="objects/requester-pays")
    objects.write(url, b"data")
    objects.write(url, bytes(client.MULTIPART_BYTES))
    objects.read(url, 0, 1)
    objects.list_under(ROOT)
    objects.delete(url)
    assert stale["UploadId"]
    operations = "CreateMultipartUpload UploadPart CompleteMultipartUpload AbortMultipartUpload ListMultipartUploads "
    operations += "PutObject HeadObject GetObject ListObjectsV2 DeleteObject"
    expected = dict.fromkeys(operations.split(), b"requester" if pays else None)
    assert sent == expected


@pytest.mark.parametrize(
    ("endpoint", "addressing", "expected"),
    [
        (None, "auto", "https://bucket.s3.amazonaws.com/key"),
        (None, "path", "https://s3.amazonaws.com/bucket/key"),
        (None, "virtual", "https://bucket.s3.amazonaws.com/key"),
        ("https://store.example", "auto", "https://store.example/bucket/key"),
        ("https://store.example", "path", "https://store.example/bucket/key"),
        ("https://store.example", "virtual", "https://bucket.store.example/key"),
    ],
)
def test_addressing_style_determines_the_url(s3, monkeypatch, endpoint, addressing, expected):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    objects.configure(addressing=addressing)
    signed = client._client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert signed.partition("?")[0] == expected


class OddServer(ThreadingHTTPServer):
    """A server that answers GETs of bytes 10-19 unlike the real one; `requests` contains their ranges."""

    def __init__(self, cut: int = 10, announced: bool = True, status: int = 206, overwritten: bool = False) -> None:
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.headers["Range"])
                first = int(self.headers["Range"][len("bytes=") :].partition("-")[0])
                body = b"0123456789"[first - 10 :]
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {first}-19/100")
                if overwritten:
                    self.send_header("ETag", f'"{len(requests)}"')
                self.send_header("Content-Length", str(min(cut, len(body)) if announced else len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def odd(s3, monkeypatch):
    """Return a function that starts an OddServer and points this process to it."""
    started = []

    def start(**behaviour) -> OddServer:
        server = OddServer(**behaviour)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("announced", [True, False])
def test_short_bodies_are_resumed(odd, announced):
    """The server sends short bodies: with the short length in Content-Length, or by closing the connection."""
    server = odd(cut=4, announced=announced)
    assert objects.read("s3://bucket/key", 10, 10) == b"0123456789"
    assert server.requests == ["bytes=10-19", "bytes=14-19", "bytes=18-19"]


@pytest.mark.slow
def test_empty_bodies_raise(odd):
    objects.configure(timeout_s=3)
    odd(cut=0)
    assert "bytes 10-19: no progress" in message(objects.read, "s3://bucket/key", 10, 10)


def test_server_without_range_support_is_refused(odd):
    odd(status=200)
    assert "does not support ranged reads" in message(objects.read, "s3://bucket/key", 10, 10)


@pytest.mark.slow
def test_server_that_ignores_if_match_is_detected(odd):
    odd(cut=4, overwritten=True)
    assert "was overwritten" in message(objects.read, "s3://bucket/key", 10, 10)


def test_html_page_of_a_proxy_is_refused(s3, monkeypatch):
    """The proxy answers every request with status 200."""
    body = b"<html><body>log in</body></html>"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        assert "check AWS_ENDPOINT_URL" in message(objects.list_under, "s3://bucket/folder")
        assert "s3://bucket/folder/index.json is HTML or XML" in message(Index.load, "s3://bucket/folder")
    finally:
        server.shutdown()
        server.server_close()
