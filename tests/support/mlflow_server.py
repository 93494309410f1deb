"""A real MLflow server for a test, on any database."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featherweight.system.processes import end_group, held_port
from featherweight.system.servers import await_url


@contextmanager
def mlflow_server(root: Path, database: str, workers: int = 1, *more: str, **variables: str) -> Iterator[str]:
    """The URL of a server that keeps its artifacts and its log in `root`, up until the block ends.

    more, variables: further arguments of its command, and of its environment.
    """
    log = root / "log"
    with held_port() as port, log.open("w") as stream:
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
        command += ["--backend-store-uri", database, "--artifacts-destination", str(root / "served"), *more]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **variables}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment)
        try:
            await_url(f"{url}/health", process, "MLflow", log, timeout_s=300)
            yield url
        finally:
            end_group(process)
