"""`featherweight ui`: a page over all models and runs of a workspace, and beside it Prefect's and MLflow's own."""

from __future__ import annotations

import threading
import time
import webbrowser
from contextlib import ExitStack, suppress

from featherweight.errors import FeatherweightError
from featherweight.masking import masked
from featherweight.registry.browsing.access import TOKEN, Access
from featherweight.registry.browsing.application import Page
from featherweight.registry.promotion import Promotion
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace
from featherweight.system.processes import held_port
from featherweight.system.servers import LOCAL, await_url, check_url, stop
from featherweight.system.services import prefect_server, start_mlflow
from flows.by_hand import approve_by_hand, promote_by_hand, roll_back_by_hand
from flows.listening import address_of, answering, listening, stoppable


class ByHand:
    """What the commands `promote`, `approve` and `rollback` do, for a page."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def promote(self, reference: str, to: str, why: str, smoke: bool) -> Promotion:
        """As `featherweight promote`, which alone can force."""
        return promote_by_hand(self._workspace, reference, to, why, force=False, smoke=smoke)

    def approve(self, reference: str, why: str, refuse: bool, smoke: bool) -> Promotion:
        """As `featherweight approve`."""
        return approve_by_hand(self._workspace, reference, why, refuse, smoke)

    def roll_back(self, model: str, why: str) -> Promotion:
        """As `featherweight rollback`."""
        return roll_back_by_hand(self._workspace, model, why)


def serve_ui(workspace: Workspace, port: int, prefect_port: int, mlflow_port: int, browser: bool, servers: bool) -> None:
    """Serve our page at once, start what the environment does not already name of the others, and go on until Ctrl-C.

    servers: False starts neither Prefect's nor MLflow's.
    """
    links = dict.fromkeys(("Prefect", "MLflow"), "") if servers else {}
    with ExitStack() as stack:
        listener = stack.enter_context(listening(LOCAL, _free(port)))
        access = Access(listener.getsockname()[1])
        registry = Registry(workspace.tracking_uri)
        page = Page(registry, ByHand(workspace), access, str(workspace.root), lambda: dict(links))
        stack.enter_context(stoppable())
        stack.enter_context(answering(page.application(), listener))
        address = f"{address_of(listener, LOCAL)}/?{TOKEN}={access.token}"
        print(f"Featherweight: {address}\n(whoever has this address decides as you: keep it to yourself)", flush=True)
        threading.Thread(target=_warm, args=(registry,), daemon=True).start()
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            for name, start in (("Prefect", _prefect), ("MLflow", _mlflow)) if servers else ():
                links[name] = masked(start(workspace, {"Prefect": prefect_port, "MLflow": mlflow_port}[name], stack))
                print(f"{name}: {links[name]}", flush=True)
            print("Ctrl-C ends all", flush=True)
            while True:
                time.sleep(1)


def _warm(registry: Registry) -> None:
    """Import MLflow's client while the browser opens; what fails is told by the page that asks again."""
    with suppress(FeatherweightError):
        registry.all_models()


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
    return _free(wanted) or stack.enter_context(held_port())


def _free(wanted: int) -> int:
    """The wanted port, 0 where somebody else listens there."""
    import socket

    with socket.socket() as probe:
        return 0 if wanted and probe.connect_ex((LOCAL, wanted)) == 0 else wanted
