"""What the commands that serve until Ctrl-C share: the socket, the server in a thread, the end, and lines on the terminal."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from featherweight.errors import ServiceError
from featherweight.visible import visible

DRAIN_S = 30.0


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket, listening before anything is loaded, so that nobody takes the port meanwhile. Raises ServiceError where taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
        raise ServiceError(f"cannot listen on port {port} of {host} ({reason}); give another (--port, --host)") from error
    with listener:
        yield listener


def address_of(listener: socket.socket, host: str) -> str:
    """The address at which a listener on `host` is asked."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def answering(application: Any, listener: socket.socket) -> Iterator[None]:
    """An ASGI application in a thread of its own; at the end it answers what it was asked, and nothing more."""
    import uvicorn

    told: Any = {"log_level": "critical", "access_log": False, "server_header": False, "timeout_keep_alive": 30}
    told |= {"lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(application, timeout_graceful_shutdown=int(DRAIN_S), **told))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(DRAIN_S + 5)


class Teller:
    """One line for what happens, or one JSON value a line."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Say it."""
        print(json.dumps({"event": event, "text": text, **facts}) if self.as_json else visible(text), flush=True)
