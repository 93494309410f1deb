"""`featherweight serve`: a registered version behind an address that stays, whichever version an alias names."""

from __future__ import annotations

import json
import os
import shlex
import time
from typing import TYPE_CHECKING, Any

from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace
from featherweight.system.servers import LOCAL
from flows.listening import DRAIN_S, Teller, address_of, answering, listening, stoppable

if TYPE_CHECKING:
    from featherweight.registry.serving.backend import Backend

TOKEN = "FEATHERWEIGHT_SERVE_TOKEN"
LOOPBACK = (LOCAL, "localhost", "::1")
TICK_S = 0.5


def serve(workspace: Workspace, reference: str, host: str, port: int, every_s: float, as_json: bool) -> None:
    """Serve until Ctrl-C or SIGTERM; what was asked by then is answered. Raises ServiceError at once where the port is taken."""
    with listening(host, port) as listener, stoppable():
        address = address_of(listener, host)
        registry = Registry(workspace.tracking_uri)
        registry.check()
        from featherweight.registry.serving.following import Follower
        from featherweight.registry.serving.front import Front

        front = Front((host, *LOOPBACK) if host in LOOPBACK else (), os.environ.get(TOKEN, ""))
        model, version = parse_reference(reference, "champion")
        told = _Teller(as_json, address)
        follower = Follower(registry, model, version, front, workspace.root / "serving", told.tell)
        try:
            with answering(front, listener):
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


class _Teller(Teller):
    """Tells the address too."""

    def __init__(self, as_json: bool, address: str) -> None:
        super().__init__(as_json)
        self._address = address

    def ready(self, backend: Backend) -> None:
        """That the first version answers, and how to ask it."""
        version, (path, body) = backend.copy.version, backend.server.example
        told = f"{version.model} version {version.version} ({version.variant} on {version.tag('engine')})"
        curl = f"curl {self._address}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
        facts = {"model": version.model, "version": version.version, "variant": version.variant, "engine": version.tag("engine")}
        batching = {"batch": backend.copy.batching.max_batch, "batch_window_s": backend.copy.batching.window_s}
        measured = {"threads": backend.copy.threads, **batching, "device": backend.copy.serving.device}
        self.tell("ready", f"ready: {told} at {self._address}", url=self._address, **facts, **measured, example=curl)
        if not self.as_json:
            print(curl, flush=True)
