"""`featherweight ui`: the Prefect and MLflow pages of a workspace."""

from __future__ import annotations

import time
import webbrowser
from contextlib import ExitStack

from featherweight.masking import masked
from featherweight.store.workspace import Workspace
from featherweight.system.processes import held_port
from featherweight.system.servers import LOCAL, await_url, check_url, stop
from featherweight.system.services import prefect_server, start_mlflow


def serve_ui(workspace: Workspace, prefect_port: int, mlflow_port: int, browser: bool) -> None:
    """Start what the environment does not already name, print where it is, and serve until Ctrl-C."""
    with ExitStack() as stack:
        pages = [_prefect(workspace, prefect_port, stack), _mlflow(workspace, mlflow_port, stack)]
        for name, url in zip(("Prefect", "MLflow"), pages, strict=True):
            print(f"{name}: {masked(url)}", flush=True)
            if browser:
                webbrowser.open(url)
        print("Ctrl-C ends both", flush=True)
        while True:
            time.sleep(1)


def _prefect(workspace: Workspace, port: int, stack: ExitStack) -> str:
    server = stack.enter_context(prefect_server(workspace.root, services=True, port=_port(port, stack)))
    server.wait()
    return server.url


def _mlflow(workspace: Workspace, port: int, stack: ExitStack) -> str:
    if workspace.tracking_uri.startswith("http"):
        check_url(workspace.tracking_uri, "MLflow", "MLFLOW_TRACKING_URI")
        return workspace.tracking_uri
    port, log = _port(port, stack), workspace.root / "mlflow-server.log"
    process = start_mlflow(workspace.tracking_uri, workspace.root / "artifacts", port, log)
    stack.callback(stop, process)
    await_url(f"http://{LOCAL}:{port}/health", process, "MLflow", log)
    return f"http://{LOCAL}:{port}"


def _port(wanted: int, stack: ExitStack) -> int:
    """The wanted port, or one that is held for us where somebody else listens there."""
    import socket

    with socket.socket() as probe:
        taken = probe.connect_ex((LOCAL, wanted)) == 0
    return stack.enter_context(held_port()) if taken else wanted
