"""Simulate a bad network: an HTTP proxy in front of an S3 server that spoils a share of the reads.

    with FaultProxy(endpoint, rate=0.1, kinds=("500", "cut"), seed=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

Only a GET of an object can be spoiled. What happens to the n-th GET of one range of an object
depends on the seed alone, whatever the threads do: a test that passes will pass again.

The client's Host header, which its signature covers, is forwarded unchanged: SeaweedFS, like all
servers that check version 4 signatures, verifies the host that it finds there.
"""

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

S3_CODES = {
    "500": "InternalError",
    "503": "ServiceUnavailable",
    "429": "SlowDown",
    "403": "AccessDenied",
    "404": "NoSuchKey",
}
KINDS = (
    *S3_CODES,
    "reset",  # the connection is reset before the answer
    "cut",  # half of the promised body, then the end of the connection
    "hang",  # no answer; the client has to give up
    "slow",  # the body drips in over SLOW_S
    "flip",  # one byte of the body is another one
    "short",  # half of the body, and headers that promise no more
)
SLOW_S = 0.2
SLOW_PIECES = 4
# These headers belong to one connection, not to the answer.
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class FaultProxy:
    """Listens on a free port while it is entered."""

    def __init__(self, upstream: str, *, rate: float, kinds: Sequence[str], seed: int) -> None:
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"no such fault: {sorted(unknown)}; there are {KINDS}")
        self.injected: Counter[str] = Counter()  # kind of fault: how often
        self.requests: Counter[str] = Counter()  # "GET /bucket/key": how often
        self.stopping = threading.Event()
        self._rate, self._kinds, self._seed = rate, tuple(kinds), seed
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(urlsplit(upstream).netloc, self)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def fault_for(self, method: str, target: str, byte_range: str) -> str | None:
        """Count a request, and choose what happens to it: a kind of fault, or nothing."""
        path = urlsplit(target).path
        with self._lock:
            self.requests[f"{method} {path}"] += 1
            if method != "GET" or "/" not in path.strip("/"):
                return None
            place = f"{path} {byte_range}"
            self._seen[place] += 1
            draw = random.Random(f"{self._seed} {place} {self._seen[place]}")
            if draw.random() >= self._rate:
                return None
            kind = draw.choice(self._kinds)
            self.injected[kind] += 1
            return kind


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, proxy: FaultProxy) -> None:
        self.upstream, self.proxy = upstream, proxy
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """Ignore a client that hangs up, which this proxy provokes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        proxy = self.server.proxy
        fault = proxy.fault_for(self.command, self.path, self.headers.get("Range", ""))
        sent = self._request_body()
        if fault == "reset":
            self._reset()
        elif fault == "hang":
            proxy.stopping.wait()
            self.close_connection = True
        elif fault in S3_CODES:
            body = f"<Error><Code>{S3_CODES[fault]}</Code><Message>injected</Message></Error>"
            self._answer(int(fault), [("Content-Type", "application/xml")], body.encode())
        else:
            self._forward(sent, fault)

    def _request_body(self) -> bytes:
        """Forward a body unchanged: if it is chunked it keeps its frames."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        frames = b""
        while not frames.endswith(b"0\r\n\r\n"):
            head = self.rfile.readline()
            frames += head + self.rfile.read(int(head, 16) + 2)
        return frames

    def _forward(self, sent: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(sent)
            response = upstream.getresponse()
            body = response.read()
        finally:
            upstream.close()
        headers = [(name, value) for name, value in response.getheaders()]
        self._answer(response.status, headers, body, fault)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        fault: str | None = None,
    ) -> None:
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if fault == "short":
            body = body[:half]
        promised = str(len(body))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
            elif name.lower() == "content-length" and self.command == "HEAD":
                promised = value
        if status >= 200 and status != 204:
            self.send_header("Content-Length", promised)
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "slow":
            self._drip(body)
        else:
            self.wfile.write(body)

    def _drip(self, body: bytes) -> None:
        size = max(1, -(-len(body) // SLOW_PIECES))
        for start in range(0, len(body), size):
            time.sleep(SLOW_S / SLOW_PIECES)
            self.wfile.write(body[start : start + size])

    def _reset(self) -> None:
        # No time to linger: the kernel then sends a reset instead of an orderly end.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())
        self.close_connection = True
