"""Starting a flow from the command line: the servers come up while the libraries are imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import Stopped
from featherweight.plan import expand
from featherweight.recipe import Recipe
from featherweight.services import check_url, configure, prefect_server
from featherweight.workspace import Workspace
from flows.view import View

if TYPE_CHECKING:
    from featherweight.result import OptimizationResult


def launch(recipe: Recipe, root: Path, view: View) -> OptimizationResult:
    """Run one optimization in this process. Raises FeatherweightError, Stopped at Ctrl-C."""
    plan = expand(recipe)
    check_url(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLflow", "MLFLOW_TRACKING_URI")
    workspace = Workspace.at(root)
    view.begin(plan)
    try:
        with prefect_flows(root, view) as run:
            from flows.optimize import optimize

            return run("optimize", recipe.name, lambda: optimize(recipe, plan, workspace, view))
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; the same command resumes where it was") from stop
    finally:
        view.close()


@contextmanager
def prefect_flows(root: Path, view: View) -> Iterator[Callable[[str, str, Callable[[], Any]], Any]]:
    """Yields `run(flow_name, run_name, function)`, which calls a function as a Prefect flow once the server is up."""
    configure(root)
    with prefect_server(root) as server:
        view.say(f"Prefect UI while this runs: {server.url}")

        def run(name: str, run_name: str, function: Callable[[], Any]) -> Any:
            from prefect import Flow

            server.wait()
            return Flow(lambda: function(), name=name, flow_run_name=run_name, persist_result=False)()

        yield run
