"""The Prefect and MLflow servers that a run needs: those that the environment names, or embedded ones beside the workspace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlparse

from featherweight.errors import ServiceError
from featherweight.system.locks import locked_file
from featherweight.system.processes import end_group, end_with_parent, free_port

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "COMPRESSED_TENSORS_LOG_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}
LOCAL = "127.0.0.1"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
SCHEDULING = ("SCHEDULER", "LATE_RUNS", "PAUSE_EXPIRATIONS", "FOREMAN", "TRIGGERS", "CANCELLATION_CLEANUP", "REPOSSESSOR")


def configure(root: Path) -> None:
    """Environment of this process and its children, before Prefect or MLflow is imported; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(root.absolute() / "prefect"))


def check_url(url: str, what: str, variable: str) -> None:
    """Raise ServiceError where nobody listens at an http(s) URL, or at a database's that is on another machine."""
    parsed = urlparse(url)
    usual = PORTS.get(parsed.scheme.partition("+")[0])
    socket_file = not parsed.netloc and not parsed.scheme.startswith("http")
    if usual is None or socket_file:
        return
    try:
        host, port = parsed.hostname or "", parsed.port or usual
    except ValueError:  # which tells a part of the password, so it is not told on
        escape = "write the /, @, : and % of a password as %2F, %40, %3A and %25"
        raise ServiceError(f"{variable} is not an address ({url}); {escape}") from None
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServiceError(f"the {what} server at {url} does not answer ({reason}); start it or unset {variable}") from error


@dataclass(frozen=True)
class PrefectServer:
    """Where a Prefect server's UI is, and its process where it is ours."""

    url: str
    process: subprocess.Popen[bytes] | None
    log: Path
    came_up: Callable[[], None] = lambda: None

    def wait(self) -> None:
        """Return when the server answers; raises ServiceError where it does not come up."""
        if self.process is not None:
            await_url(f"{self.url}/api/health", self.process, "Prefect", self.log)
            self.came_up()


@contextmanager
def prefect_server(root: Path, services: bool = False) -> Iterator[PrefectServer]:
    """The server that $PREFECT_API_URL names, or an embedded one that starts now and lasts as long as the block.

    services: run the scheduler too, for deployments on a schedule.
    """
    log = root / "prefect-server.log"
    named = os.environ.get("PREFECT_API_URL")
    if named:
        check_url(named, "Prefect", "PREFECT_API_URL")
        yield PrefectServer(named.removesuffix("/api"), None, log)
        return
    with ExitStack() as first:
        came_up = _alone_the_first_time(root, first)
        port = free_port()
        process = start_prefect(root, port, services)
        os.environ["PREFECT_API_URL"] = f"http://{LOCAL}:{port}/api"
        try:
            yield PrefectServer(f"http://{LOCAL}:{port}", process, log, came_up)
        finally:
            del os.environ["PREFECT_API_URL"]
            stop(process)


def _alone_the_first_time(root: Path, lock: ExitStack) -> Callable[[], None]:
    """Let no other process start a server in the workspace until this one is up, unless one of this Prefect's version has been.

    The first one makes the tables, and two that make them at once both fail. What is returned is to be called when it is up.
    """
    home = Path(os.environ.get("PREFECT_HOME") or root / "prefect")
    done = home / f".tables-of-{version('prefect')}"
    if done.exists():
        return lock.close
    home.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked_file(home / ".tables.lock"))

    def came_up() -> None:
        done.touch()
        lock.close()

    return came_up


def start_prefect(root: Path, port: int, services: bool = True) -> subprocess.Popen[bytes]:
    """Start a Prefect server on a SQLite file in the workspace; its log goes there too.

    services: the loops that schedules need. What records task runs for the page runs always.
    """
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOCAL, "--port", str(port)]
    environment = {
        "PREFECT_API_URL": "",
        "PREFECT_UI_API_URL": f"http://{LOCAL}:{port}/api",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    }
    if not services:
        environment |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in SCHEDULING}
    return start(command, root / "prefect-server.log", environment)


def start_mlflow(tracking_uri: str, artifacts: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start an MLflow server on the workspace's own store, whose address may hold a password: others can read a command line."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOCAL, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", artifacts.as_uri()]
    fewer = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight idle processes less, up in half the time
    return start(command, log, {"MLFLOW_BACKEND_STORE_URI": tracking_uri, **fewer})


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a server that a Ctrl-C in the terminal does not reach, and that dies with this process however that ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value != ""}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )


def await_url(url: str, process: subprocess.Popen[bytes], what: str, log: Path, timeout_s: float = 120) -> None:
    """Wait until a server answers; raises ServiceError with the end of its log where it does not."""
    import httpx

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code < 500:
                return
        except httpx.HTTPError:
            if process.poll() is not None:
                break
        time.sleep(0.1)
    tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    raise ServiceError(f"the {what} server did not start; see {log}{': ' + tail[0] if tail else ''}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its children."""
    if process.poll() is None:
        end_group(process)
