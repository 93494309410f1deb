"""A way to an S3 server on which requests are lost: some are cut, some answered with 503, and at times all are."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


class Faults:
    """How many requests are lost: a share of them, or all while it is `away`."""

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self.away, self.seen, self.lost = share, False, 0, 0
        self._random, self._lock = random.Random(seed), threading.Lock()

    def next(self) -> str | None:
        """What becomes of the next request: 'cut', 'refused', or None where it arrives."""
        with self._lock:
            self.seen += 1
            lost = self.away or self._random.random() < self.share
            self.lost += lost
            return self._random.choice(["cut", "refused"]) if lost else None


@contextmanager
def faulty_way(endpoint: str, faults: Faults) -> Iterator[str]:
    """The address of a proxy before an S3 server. The host is signed, so the proxy hands on the one that it was called by."""
    there = urlparse(endpoint).netloc

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def _pass(self) -> None:
            fault = faults.next()
            if fault == "cut":
                self.close_connection = True
                return
            if fault == "refused":
                self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                return
            server = http.client.HTTPConnection(there, timeout=30)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders()
            answer = server.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())
            server.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            own = ("content-length", "transfer-encoding", "connection")
            told = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            kept = [(name, value) for name, value in headers if name.lower() not in own]
            for name, value in [*kept, ("Content-Length", told or str(len(content)))]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = _pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
