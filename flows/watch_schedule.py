"""`featherweight watch`: serve the watch flow on a schedule, with an embedded Prefect server where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.masking import masked
from featherweight.recipe.reading import load_recipe
from featherweight.store.workspace import Workspace
from featherweight.system.environment import configure
from featherweight.system.servers import check_url
from featherweight.system.services import prefect_server
from flows.progress_view import View


def serve_watch(
    source: str, recipe: Path, overrides: tuple[str, ...], root: Path, every_s: float, once: bool, view: View
) -> list[dict[str, Any]]:
    """Look once and return what was started, or serve the schedule until Ctrl-C."""
    load_recipe(recipe, overrides)
    workspace = Workspace.at(root)
    check_url(workspace.tracking_uri, "MLflow", "MLFLOW_TRACKING_URI")
    configure(root)
    parameters: dict[str, Any] = {
        "source": source,
        "recipe": str(recipe.absolute()),
        "overrides": list(overrides),
        "workspace": str(root.absolute()),
    }
    with prefect_server(root, services=not once) as server:
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

        from flows.watch import watch_flow

        server.wait()
        view.say(f"Prefect UI while this runs: {masked(server.url)}")
        if once:
            return watch_flow(**parameters)
        one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
        watch_flow.serve("watch", interval=every_s, parameters=parameters, global_limit=one_at_a_time, pause_on_shutdown=False)
        return []
