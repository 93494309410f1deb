"""Starting a flow from the command line: the servers come up while the libraries are imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import Stopped
from featherweight.masking import masked
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.store.workspace import Workspace
from featherweight.system.services import check_url, configure, prefect_server
from flows.progress_view import View

if TYPE_CHECKING:
    from featherweight.report.result import OptimizationResult


def launch(recipe: Recipe, root: Path, view: View) -> OptimizationResult:
    """Run one optimization in this process. Raises FeatherweightError, Stopped at Ctrl-C."""
    plan = expand(recipe)
    check_url(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLflow", "MLFLOW_TRACKING_URI")
    workspace = Workspace.at(root)
    configure(root)
    view.begin(plan)
    try:
        with prefect_server(root) as server:
            view.say(f"Prefect UI while this runs: {masked(server.url)}")
            from prefect import Flow

            from flows.optimize import optimize

            server.wait()
            body = lambda: optimize(recipe, plan, workspace, view)  # noqa: E731 - Prefect takes what has no parameters
            return Flow(body, name="optimize", flow_run_name=recipe.name, persist_result=False)()
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; the same command resumes where it was") from stop
    finally:
        view.close()
