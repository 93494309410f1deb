"""`featherweight optimize`: the flow with a view of its progress; the servers come up while the libraries are imported."""

from __future__ import annotations

import os
from pathlib import Path

from featherweight.errors import Stopped, was_interrupted
from featherweight.masking import masked
from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import expand
from featherweight.recipe.reading import load_recipe
from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from featherweight.system.environment import configure
from featherweight.system.servers import check_url
from featherweight.system.services import prefect_server
from flows.progress_view import View, shown
from tasks.forecast import require_room


def launch(recipe: Path, overrides: tuple[str, ...], root: Path, view: View) -> OptimizationResult:
    """Run one optimization in this process. Raises FeatherweightError, Stopped at Ctrl-C."""
    loaded = load_recipe(recipe, overrides)
    facts = Facts.read(loaded)
    plan = expand(loaded, facts=facts)
    require_room(facts.size(loaded), root)
    check_url(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLflow", "MLFLOW_TRACKING_URI")
    workspace = Workspace.at(root)
    configure(root)
    view.begin(plan)
    try:
        with prefect_server(root) as server, shown(view, workspace.root) as progress:
            view.say(f"Prefect UI while this runs: {masked(server.url)}")
            from flows.optimize import optimize_flow
            from tasks.parent_run import connect

            if server.process:
                connect(workspace)  # which makes its tables while the server makes its own
            server.wait()
            told = optimize_flow(str(recipe), list(overrides), workspace=str(root), progress=str(progress.path))
            return OptimizationResult.from_dict(told)
    except BaseException as stop:
        if not was_interrupted(stop):
            raise
        raise Stopped("stopped; the same command resumes where it was") from stop
    finally:
        view.close()
