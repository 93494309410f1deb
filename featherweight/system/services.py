"""The Prefect and MLflow servers that a run needs: those that the environment names, or embedded ones beside the workspace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from featherweight.system import fresh_tables
from featherweight.system.locks import locked_file
from featherweight.system.processes import held_port
from featherweight.system.servers import LOCAL, await_url, check_url, start, stop

LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60",
}
"""A server keeps the leases of concurrency slots on disk: after a kill, those in its memory would hold their slots for good."""
SCHEDULING = ("SCHEDULER", "LATE_RUNS", "PAUSE_EXPIRATIONS", "FOREMAN", "TRIGGERS", "CANCELLATION_CLEANUP", "REPOSSESSOR")


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
def prefect_server(root: Path, services: bool = False, port: int | None = None) -> Iterator[PrefectServer]:
    """The server that $PREFECT_API_URL names, or an embedded one that starts now and lasts as long as the block.

    services: run the scheduler too, for deployments on a schedule. port: where it listens; a free one where it is not said.
    """
    log = root / "prefect-server.log"
    named = os.environ.get("PREFECT_API_URL")
    if named:
        check_url(named, "Prefect", "PREFECT_API_URL")
        yield PrefectServer(named.removesuffix("/api"), None, log)
        return
    with ExitStack() as first:
        came_up = _alone_the_first_time(root, first)
        port = port or first.enter_context(held_port())
        process = start_prefect(root, port, services)
        os.environ["PREFECT_API_URL"] = f"http://{LOCAL}:{port}/api"
        try:
            yield PrefectServer(f"http://{LOCAL}:{port}", process, log, came_up)
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            stop(process)


def _alone_the_first_time(root: Path, lock: ExitStack) -> Callable[[], None]:
    """Let no other process start a server in the workspace until this one is up, unless one of this Prefect's version has been.

    The first one makes the tables, and two that make them at once both fail. What is returned is to be called when it is up.
    Where an earlier workspace's tables could be copied there is nothing to make.
    """
    home = _home(root)
    done = home / f".tables-of-{version('prefect')}"
    if done.exists():
        return lock.close
    home.mkdir(parents=True, exist_ok=True)
    lock.enter_context(locked_file(home / ".tables.lock"))
    database = home / "prefect.db"
    fresh = not database.exists()
    if fresh_tables.place(database):
        done.touch()
        return lock.close

    def came_up() -> None:
        if fresh:
            fresh_tables.keep(database)
        done.touch()
        lock.close()

    return came_up


def _home(root: Path) -> Path:
    """Where Prefect keeps its own files."""
    return Path(os.environ.get("PREFECT_HOME") or root / "prefect")


def start_prefect(root: Path, port: int, services: bool = True) -> subprocess.Popen[bytes]:
    """Start a Prefect server on a SQLite file in the workspace; its log goes there too.

    services: the loops that schedules need. What records task runs for the page runs always.
    """
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOCAL, "--port", str(port)]
    environment = {
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(_home(root)),
        "PREFECT_UI_API_URL": f"http://{LOCAL}:{port}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOCAL}:{port}",  # any page in the user's browser could call it else
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        **LEASES,
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
