"""The server process of one verified version: the engine's own where it has one, else MLflow's scoring server.

It listens on a Unix socket in a folder for its owner alone, so that nobody else on the machine can ask it, or answer in its place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from featherweight.errors import StageError, ToolchainError, one_line
from featherweight.registry.serving.parameters import DESCRIPTION, Parameters, described
from featherweight.registry.serving.scoring import PROGRAM
from featherweight.registry.serving.verified_copy import VerifiedCopy
from featherweight.registry.smoke import NEW_TOKENS, TEXT, TEXT_TOKENS
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import environment
from featherweight.runtimes.interface import EngineServer, Limits
from featherweight.spec import HEADED
from featherweight.system.device import CUDA, cuda_refusal
from featherweight.system.processes import GroupWatch, end_with_parent

START_S, ANSWER_S = 900.0, 600.0
PATHS = ("/invocations", "/version")
SOCKET_PATH = 100  # bytes that the address of a Unix socket may have everywhere


class Backend:
    """A server of a version, started at once; `in_flight` requests are being answered by it.

    known: the parameters that it takes at its paths, as far as it tells.

    Raises ToolchainError where this machine has no such engine.
    """

    def __init__(self, copy: VerifiedCopy) -> None:
        self.copy, self.in_flight = copy, 0
        self.known: Parameters = {}
        self._lock = threading.Lock()
        self._home = _socket_folder()
        self.socket = self._home / "socket"
        self.log = copy.folder.parent / "server.log"
        try:
            self.server = engine_server(copy, self.socket)
            self.process = self._start()
            self.watch = GroupWatch(self.process)
        except BaseException:
            shutil.rmtree(self._home, ignore_errors=True)
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        env = environment(self.copy.threads) | dict(self.server.environment)
        with self.log.open("wb") as stream:
            return subprocess.Popen(
                self.server.command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env,
                cwd=self._home,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process.poll() is None

    def wait(self) -> None:
        """Return once it has answered a short request. Raises StageError where it does not."""
        import httpx

        transport, deadline = httpx.HTTPTransport(uds=str(self.socket)), time.monotonic() + START_S
        with httpx.Client(transport=transport, base_url="http://backend", trust_env=False) as client:
            while not _healthy(client):
                if not self.alive:
                    raise StageError(f"its server did not start; {self._said()}")
                if time.monotonic() > deadline:
                    raise StageError(f"its server was not ready after {START_S:.0f} s; {self._said()}")
                time.sleep(0.1)
            path, body = self.server.example
            try:
                answer = client.post(path, json=body, timeout=ANSWER_S)
            except httpx.HTTPError as error:
                raise StageError(f"it did not answer: {one_line(error)}; {self._said()}") from error
            self.known = _parameters(client, self.server)
        if answer.status_code != 200:
            raise StageError(f"it answered a short request with status {answer.status_code}: {one_line(answer.text)}")

    def take(self) -> None:
        """Count a request that is going to be asked."""
        with self._lock:
            self.in_flight += 1

    def release(self) -> None:
        """Count a request no more."""
        with self._lock:
            self.in_flight -= 1

    def drain(self, patience_s: float) -> bool:
        """Wait until nothing is in flight; False after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while self.in_flight and time.monotonic() < deadline and self.alive:
            time.sleep(0.02)
        return not self.in_flight

    def close(self) -> None:
        """End it, with the engine behind it."""
        self.watch.end()
        shutil.rmtree(self._home, ignore_errors=True)

    def _said(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"it said: {one_line(lines[-1])}" if lines else "it said nothing"


def engine_server(copy: VerifiedCopy, socket: Path) -> EngineServer:
    """How a version is served: as it was measured. Raises ToolchainError where this machine cannot."""
    serving, runtime = copy.serving, RUNTIMES[copy.serving.engine]
    if reason := runtime.missing():
        raise ToolchainError(f"{serving.engine} cannot run here: {reason}")
    if serving.device == CUDA and (reason := cuda_refusal()):
        raise ToolchainError(f"this model was verified on a GPU and is served from one, and {reason}")
    return server_of(copy, socket)


def server_of(copy: VerifiedCopy, socket: Path) -> EngineServer:
    """The same, whatever this machine is."""
    runtime = RUNTIMES[copy.serving.engine]
    limits = Limits(copy.threads, copy.max_tokens, copy.batching.max_batch, copy.batching.window_s)
    return runtime.server(copy.served, copy.version.model, limits, socket) or _scoring_server(copy, socket)


def _scoring_server(copy: VerifiedCopy, socket: Path) -> EngineServer:
    """MLflow's scoring server of the verified folder."""
    from mlflow.pyfunc.scoring_server import _SERVER_MODEL_PATH, SERVING_MODEL_CONFIG

    program = ["-m", "uvicorn", "--factory", PROGRAM, "--no-access-log", "--log-level", "warning"]
    return EngineServer(
        command=(sys.executable, *program, "--uds", str(socket)),
        environment={
            _SERVER_MODEL_PATH: str(copy.folder),
            SERVING_MODEL_CONFIG: json.dumps(copy.opened),
            "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(int(ANSWER_S)),
        },
        paths=PATHS,
        example=("/invocations", _example(copy)),
    )


def _example(copy: VerifiedCopy) -> dict[str, Any]:
    if copy.task in HEADED:
        return {"inputs": [TEXT]}
    return {"inputs": [TEXT], "params": {"max_new_tokens": max(1, min(NEW_TOKENS, copy.max_tokens - TEXT_TOKENS))}}


def _healthy(client: Any) -> bool:
    import httpx

    try:
        return client.get("/health", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def _parameters(client: Any, server: EngineServer) -> Parameters:
    """What an engine's own server tells of its requests; MLflow's refuses by name what a model does not take."""
    import httpx

    if server.paths == PATHS:
        return {}
    try:
        return described(client.get(DESCRIPTION, timeout=ANSWER_S).json(), server.paths)
    except (httpx.HTTPError, ValueError):
        return {}


def _socket_folder() -> Path:
    """A folder for its owner alone whose path is short enough for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="fw-"))
    if len(str(folder / "socket")) <= SOCKET_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="fw-", dir="/tmp"))
