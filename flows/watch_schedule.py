"""`featherweight watch`: look once, serve the looks and their optimizations on a schedule, or tell how the arrivals stand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.arrivals import Seen, look
from featherweight.checkpoint.training_runs import Policy
from featherweight.errors import RecipeError
from featherweight.masking import masked
from featherweight.recipe.reading import load_recipe
from featherweight.store.artifact import content_digest
from featherweight.store.workspace import Workspace
from featherweight.system.environment import configure
from featherweight.system.processes import ENDS_WITH_PARENT
from featherweight.system.servers import check_url
from featherweight.system.services import prefect_server
from flows.progress_view import View
from tasks.claims import Patience

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


def look_once(parameters: dict[str, Any], root: Path, view: View) -> list[dict[str, Any]]:
    """Look once, optimize here what is due, and return what became of each arrival."""
    with _server(parameters, root, view, scheduled=False):
        from flows.watch import run_due, watch_flow

        deployment = _deployment(root)
        deployment.apply()
        return run_due(watch_flow(**parameters), parameters["deployment"])


def serve_watch(parameters: dict[str, Any], root: Path, every_s: float, view: View) -> None:
    """Look every so often, and optimize what was claimed, one after another in processes of their own, until Ctrl-C."""
    with _server(parameters, root, view, scheduled=True):
        from prefect import serve
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.deployments.runner import EntrypointType

        from flows.watch import watch_flow
        from tasks.claim_runs import ClaimRuns

        # A look that lasts longer than the interval is not joined by another.
        alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
        looks: Any = watch_flow.to_deployment(
            name_of(root),
            interval=every_s,
            parameters=parameters,
            concurrency_limit=alone,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        os.environ[ENDS_WITH_PARENT] = "1"
        looks.apply()
        ClaimRuns(f"watch/{name_of(root)}").free_dead()  # a look that was killed would keep the next ones out for a minute
        serve(looks, _deployment(root), pause_on_shutdown=False, print_starting_message=False)


def arrivals_status(root: Path, patience: Patience, source: str, take: str, settle_s: float) -> list[dict[str, Any]]:
    """How every arrival stands that was ever claimed in a workspace, or at the Prefect server that the environment names; and
    those at `source`, where one is given, that are not taken yet, or never.
    """
    unready = not_ready(look(source, root / "arrivals", settle_s, Policy.of(take).taken)) if source else []
    configure(root)
    with prefect_server(root) as server:
        from tasks.claim_runs import ClaimRuns

        server.wait()
        return [*(claim.to_dict(patience) for claim in ClaimRuns("").claims(patience).values()), *unready]


def not_ready(seen: list[Seen]) -> list[dict[str, Any]]:
    """What waits for something, or is left out, and why."""
    return [{"source": one.source, "status": one.state, "reason": one.reason} for one in seen if not one.identity]


def parameters_of(
    source: str, recipe: Path, overrides: tuple[str, ...], root: Path, take: str, settle_s: float, patience: Patience
) -> dict[str, Any]:
    """What the watch flow is called with. Raises RecipeError before anything starts."""
    load_recipe(recipe, overrides)
    Policy.of(take)
    if masked(source) != source:
        raise RecipeError(f"{source} holds a password or a key; give credentials by the environment (AWS_..., HF_TOKEN)")
    if not settle_s >= 0:
        raise RecipeError(f"--settle {settle_s}: expected seconds, 0 or more")
    return {
        "source": source if ":" in source.partition("/")[0] else str(Path(source).expanduser().absolute()),
        "recipe": str(recipe.absolute()),
        "overrides": list(overrides),
        "workspace": str(root.absolute()),
        "take": take,
        "settle_s": settle_s,
        "deployment": f"optimize/{name_of(root)}",
        "patience": asdict(patience),
    }


def name_of(root: Path) -> str:
    """Name of a workspace's own deployments: what one machine optimizes, no other takes up."""
    return f"arrivals-{content_digest([socket.gethostname(), str(root.absolute())])[:8]}"


def _deployment(root: Path) -> RunnerDeployment:
    """The optimizations of a workspace's arrivals, one at a time: two would spoil each other's measurements."""
    from prefect.deployments.runner import EntrypointType

    from flows.optimize import optimize_flow

    made: Any = optimize_flow.to_deployment(name_of(root), concurrency_limit=1, entrypoint_type=EntrypointType.MODULE_PATH)
    return made


@contextmanager
def _server(parameters: dict[str, Any], root: Path, view: View, scheduled: bool) -> Iterator[None]:
    """The servers that a look needs, up."""
    workspace = Workspace.at(root)
    check_url(workspace.tracking_uri, "MLflow", "MLFLOW_TRACKING_URI")
    configure(root)
    with prefect_server(root, services=scheduled) as server:
        from flows.watch import require_store

        require_store(workspace, load_recipe(Path(parameters["recipe"]), tuple(parameters["overrides"])).name)
        server.wait()
        view.say(f"watching {masked(parameters['source'])}; Prefect UI while this runs: {masked(server.url)}")
        yield
