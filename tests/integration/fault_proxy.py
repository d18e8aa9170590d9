"""An HTTP proxy on loopback, in front of the S3 server, that injects the faults that a test asks for."""

import fcntl
import socket
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import urlsplit

TARGET_SECONDS = 60  # how long the server may be silent
BLOCK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """A fault of one request: in the request body of a PUT, otherwise in the response body."""

    kind: str
    seconds: float = 0.0
    status: int = 0


RESET = Fault("reset")  # the connection is reset (RST) in the middle of the body
TRUNCATE = Fault("truncate")  # the connection is closed in the middle of the body
FLIP = Fault("flip")  # one bit in the middle of the body is flipped


def stall(seconds: float) -> Fault:
    """Send half the body, then wait for that long."""
    return Fault("stall", seconds=seconds)


def refuse(status: int, code: str) -> Fault:
    """Answer with an S3 error response without asking the server."""
    return Fault(code, status=status)


UNAVAILABLE = refuse(503, "SlowDown")


class FaultProxy:
    """Forward requests to `target_endpoint`, with `faults`, as a context manager.

    faults: called with (the number of earlier requests with this method, the method, path and query).
    port: the port to listen on; by default any free one.
    endpoint: the proxy's URL. While the server is down, the proxy answers 502.
    requests: (method, path and query) in the order of arrival.
    body_bytes: for each path without query, the number of body bytes that the server sent to clients.
    """

    def __init__(
        self,
        target_endpoint: str,
        faults: Callable[[int, str, str], Fault | None] = lambda number, method, path: None,
        *,
        port: int = 0,
    ) -> None:
        self.target = urlsplit(target_endpoint)
        self.faults = faults
        self.requests: list[tuple[str, str]] = []
        self.body_bytes: Counter[str] = Counter()
        self.stopped = threading.Event()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()

    def count(self, method: str) -> int:
        """Return the number of requests with this method so far."""
        with self._lock:
            return self._seen[method]

    def arrived(self, method: str, path: str) -> Fault | None:
        """Record a request and return its fault."""
        with self._lock:
            number = self._seen[method]
            self._seen[method] += 1
            self.requests.append((method, path))
        return self.faults(number, method, path)

    def sending(self, path: str, number: int) -> None:
        """Record body bytes that are sent to a client."""
        with self._lock:
            self.body_bytes[path.partition("?")[0]] += number


class _Server(ThreadingHTTPServer):
    proxy: FaultProxy
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: socket.socket, address) -> None:
        self._open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in self._open.copy():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address) -> None:
        """Ignore connection errors, which tests cause on purpose; show all others."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)


class _Cut(Exception):
    """The connection to the client is to be closed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open; answers `Expect: 100-continue`
    disable_nagle_algorithm = True
    server: _Server

    def forward(self) -> None:
        proxy = self.server.proxy
        fault = proxy.arrived(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self._blocks(self.rfile.read, length, fault if self.command == "PUT" else None)
        upstream = HTTPConnection(proxy.target.hostname, proxy.target.port, timeout=TARGET_SECONDS)
        try:
            if fault is not None and fault.status:
                self._refuse(fault.status, fault.kind, body)
                return
            try:
                response = self._ask(upstream, body)
            except (OSError, HTTPException):
                self._refuse(502, "BadGateway", body)
            else:
                self._answer(response, fault if self.command != "PUT" else None)
        except _Cut:
            self._cut(reset=fault == RESET)
        finally:
            upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def _ask(self, upstream: HTTPConnection, body: Iterator[bytes]):
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # including Host, which is signed
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders()
        for block in body:
            upstream.send(block)
        return upstream.getresponse()

    def _answer(self, response, fault: Fault | None) -> None:
        read, length = response.read, response.length
        if length is None:  # chunked: a listing
            content = response.read()
            length, read = len(content), BytesIO(content).read
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        announced = response.headers["Content-Length"] if self.command == "HEAD" else length
        self.send_header("Content-Length", str(announced or 0))
        self.end_headers()
        for block in self._blocks(read, length, fault):
            self.server.proxy.sending(self.path, len(block))
            self.wfile.write(block)

    def _blocks(self, read: Callable[[int], bytes], length: int, fault: Fault | None) -> Iterator[bytes]:
        """Yield a body in blocks; apply the fault after length // 2 bytes."""
        position, middle = 0, length // 2
        while position < length:
            at_fault = fault is not None and position == middle
            if at_fault and fault in (RESET, TRUNCATE):
                raise _Cut
            if at_fault:
                self.server.proxy.stopped.wait(fault.seconds)
            until = middle if position < middle else length
            block = read(min(BLOCK, until - position))
            if not block:
                raise _Cut
            position += len(block)
            yield bytes([block[0] ^ 1]) + block[1:] if at_fault and fault == FLIP else block

    def _refuse(self, status: int, code: str, body: Iterator[bytes]) -> None:
        for _ in body:  # otherwise the next request on this connection would start with the rest of the body
            pass
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as planned</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closing the last reference to a socket with a linger time of 0 s sends RST and discards unsent data. Wait
            # until the send queue is empty, so that the break is always at the same byte.
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                time.sleep(0.001)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, *_) -> None:
        """Log nothing."""
