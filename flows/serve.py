"""`featherweight serve`: a registered version behind an address that stays, whichever version an alias names."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featherweight.errors import ServiceError
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace
from featherweight.system.servers import LOCAL

if TYPE_CHECKING:
    from featherweight.registry.serving.backend import Backend
    from featherweight.registry.serving.front import Front

TOKEN = "FEATHERWEIGHT_SERVE_TOKEN"
LOOPBACK = (LOCAL, "localhost", "::1")
TICK_S, DRAIN_S = 0.5, 30.0


def serve(workspace: Workspace, reference: str, host: str, port: int, every_s: float, as_json: bool) -> None:
    """Serve until Ctrl-C or SIGTERM; what was asked by then is answered. Raises ServiceError at once where the port is taken."""
    with _listening(host, port) as listener, _stoppable():
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        registry = Registry(workspace.tracking_uri)
        registry.check()
        from featherweight.registry.serving.following import Follower
        from featherweight.registry.serving.front import Front

        front = Front((host, *LOOPBACK) if host in LOOPBACK else (), os.environ.get(TOKEN, ""))
        model, version = parse_reference(reference, "champion")
        told = _Teller(as_json, address)
        follower = Follower(registry, model, version, front, workspace.root / "serving", told.tell)
        try:
            with _answering(front, listener):
                told.ready(follower.begin())
                _follow(follower, 0.0 if version.isdigit() else every_s)
        except KeyboardInterrupt:
            told.tell("stopped", "stopped")
        finally:
            follower.close(DRAIN_S)


def _follow(follower: Any, every_s: float) -> None:
    """Look every so often, and after a server that died; a version that is named by its number needs no look."""
    last = time.monotonic()
    while True:
        time.sleep(TICK_S)
        follower.revive()
        if every_s and time.monotonic() - last >= every_s:
            follower.look()
            last = time.monotonic()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The socket, listening before anything is loaded, so that nobody takes the port meanwhile."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
        raise ServiceError(f"cannot listen on port {port} of {host} ({reason}); give another (--port, --host)") from error
    with listener:
        yield listener


@contextmanager
def _stoppable() -> Iterator[None]:
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
def _answering(front: Front, listener: socket.socket) -> Iterator[None]:
    """The front in a thread of its own; at the end it answers what it was asked, and nothing more."""
    import uvicorn

    told: Any = {"log_level": "critical", "access_log": False, "server_header": False, "lifespan": "off", "timeout_keep_alive": 30}
    server = uvicorn.Server(uvicorn.Config(front, timeout_graceful_shutdown=int(DRAIN_S), **told))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(DRAIN_S + 5)


class _Teller:
    """One line for what happens, or one JSON value a line."""

    def __init__(self, as_json: bool, address: str) -> None:
        self._as_json, self._address = as_json, address

    def ready(self, backend: Backend) -> None:
        """That the first version answers, and how to ask it."""
        version, (path, body) = backend.copy.version, backend.server.example
        told = f"{version.model} version {version.version} ({version.variant} on {version.tag('engine')})"
        curl = f"curl {self._address}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
        facts = {"model": version.model, "version": version.version, "variant": version.variant, "engine": version.tag("engine")}
        measured = {"threads": backend.copy.threads, "batch": backend.copy.batch, "device": backend.copy.serving.device}
        self.tell("ready", f"ready: {told} at {self._address}", url=self._address, **facts, **measured, example=curl)
        if not self._as_json:
            print(curl, flush=True)

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Say it."""
        print(json.dumps({"event": event, "text": text, **facts}) if self._as_json else text, flush=True)
