"""A server on a Unix socket that answers at once: an engine's own server, for tests of what stands before it."""

from __future__ import annotations

import json
import os
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler

ASKED = {"anyOf": [{"$ref": "#/components/schemas/Ask"}, {"properties": {"messages": {}}}]}
DESCRIPTION = {
    "paths": {"/v1/completions": {"post": {"requestBody": {"content": {"application/json": {"schema": ASKED}}}}}},
    "components": {"schemas": {"Ask": {"properties": {"prompt": {}, "temperature": {}}}}},
}
"""What it tells of itself in OpenAPI, as vLLM's server does: of one path."""


class Handler(BaseHTTPRequestHandler):
    """Answers any POST with the name; to 'die' by ending the process, to 'fail' by an error with a path, or by the one given."""

    protocol_version = "HTTP/1.1"
    name = sys.argv[2]

    def do_GET(self) -> None:
        self._answer(200, DESCRIPTION if self.path == "/openapi.json" else {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        while "until" in asked and not os.path.exists(asked["until"]):  # noqa: PTH110 - pathlib takes as long as all else to import
            time.sleep(0.01)
        if "die" in asked:
            os._exit(3)
        trace = {"error_code": "BAD", "message": f"wrong\n at {sys.prefix}/lib/x.py", "stack_trace": "Traceback"}
        told = trace if asked.get("fail") is True else asked.get("fail")
        self._answer(400 if "fail" in asked else 200, told if "fail" in asked else {"by": self.name})

    def _answer(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "socket"


class Server(socketserver.ThreadingUnixStreamServer):
    request_queue_size = 256
    daemon_threads = True


if __name__ == "__main__":
    Server(sys.argv[1], Handler).serve_forever()
