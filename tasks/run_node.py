"""Running a node of the plan as a Prefect task, or taking its verified result from the cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from featherweight.errors import FeatherweightError, IntegrityError, ServiceError, StageError, Unreachable
from featherweight.recipe.nodes import Node
from featherweight.spec import Spec
from featherweight.store.artifact import ArtifactRef, content_digest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace
from featherweight.system.environment import QUIET
from tasks.claim_runs import require_own_run
from tasks.nested_run import execute
from tasks.outcome import Outcome
from tasks.parent_run import ParentRun
from tasks.stage import Stage

if TYPE_CHECKING:
    from prefect import Task

Body = Callable[..., dict[str, Any]]
"""What a stage's Prefect task does: `run_stage`, here or on another machine."""
WAITS_S = (2, 10, 30, 60, 90, 120)
"""The waits before each further try of a stage: five minutes in all, which a server takes that is started anew."""
SETTINGS = {Path("prefect.toml"): b"", Path("pyproject.toml"): b"tool.prefect", Path(".env"): b"PREFECT_"}
"""Where Prefect looks for settings, beside its home and the environment, and what stands there where it finds any."""


def run_node(stage: Stage, node: Node, inputs: Mapping[str, Outcome], parent: ParentRun, body: Body | None = None) -> Outcome:
    """Run a node on the artifacts of `inputs`, which are there, within a Prefect flow. body: `run_stage` by default.

    Raises GateError, before a stage that acts on the registry, where the flow run is over without us.
    """
    from prefect.utilities.annotations import quote

    if stage.acts:
        require_own_run()
    try:
        key = stage.key(node, {name: outcome.artifact.digest for name, outcome in inputs.items()})
    except FeatherweightError as error:
        return Outcome.failure(node.id, error)
    returned = {name: outcome.returned for name, outcome in inputs.items()}
    state: Any = _task(stage, node, key, parent.workspace, body or run_stage)(
        quote(stage), quote(node), returned, quote(parent), key, return_state=True
    )
    if state.is_completed():
        return Outcome(node.id, "cached" if state.name == "Cached" else "done", state.result())
    raised = state.result(raise_on_failure=False)
    return Outcome.failure(node.id, raised if isinstance(raised, Exception) else StageError(f"{node.id}: {state.message}"))


def run_stage(stage: Stage, node: Node, inputs: Mapping[str, Mapping[str, Any]], parent: ParentRun, key: str) -> dict[str, Any]:
    """The body of every stage's Prefect task. It takes values only: it may run in another process, or on another machine."""
    refs = {name: ArtifactRef.model_validate(ref) for name, ref in inputs.items()}
    with mlflow_explained(parent.workspace.tracking_uri):
        return execute(stage, node, refs, parent, key).model_dump()


def _task(stage: Stage, node: Node, key: str, workspace: Workspace, body: Body) -> Task[..., dict[str, Any]]:
    """The Prefect task of a node, named by what it does; one that runs is tagged by its stage, so that a server may limit those.

    For each tag of a task the server is asked for room, also where there is nothing to do.
    """
    from prefect import Task

    slot, due = _slot(key, workspace), stage.acts or not is_cached(key, workspace)
    return Task(
        body,
        name=f"{stage.name}: {node.label}",
        task_run_name=f"{node.id} [{stage.name} {method(node.spec)}]".replace(" ]", "]").replace("{", "(").replace("}", ")"),
        tags=[stage.name] if due else [],
        cache_key_fn=lambda *_: slot,
        persist_result=True,
        result_serializer="json",
        refresh_cache=due,
        retries=len(WAITS_S),
        retry_delay_seconds=list(WAITS_S),
        retry_condition_fn=_is_transient,
    )


def _is_transient(task: Any, run: Any, state: Any) -> bool:
    """A server that does not answer may come back within minutes; what one refuses is worth a second try, no more."""
    raised = state.result(raise_on_failure=False)
    return isinstance(raised, Unreachable) or (isinstance(raised, ServiceError) and run.run_count <= 1)


def _slot(key: str, workspace: Workspace) -> str:
    """Where Prefect keeps the reference: results of one tracking store mean nothing to another."""
    return content_digest([key, workspace.tracking_uri])


def cached_ref(key: str, workspace: Workspace) -> ArtifactRef | None:
    """The reference that Prefect's result store holds under a key."""
    try:
        folder = None if "prefect" in sys.modules else _results_of_prefect()
        if folder is not None:
            record = json.loads((folder / _slot(key, workspace)).read_bytes())
            return ArtifactRef.model_validate_json(record["result"])
        from prefect.results import ResultStore

        store = ResultStore(result_storage=_result_storage())
        return ArtifactRef.model_validate(store.read(_slot(key, workspace)).result)
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _results_of_prefect() -> Path | None:
    """The folder where Prefect keeps results, known without importing it; None where it is told anything that may change that."""
    home = Path(os.environ.get("PREFECT_HOME", ""))
    told = {name for name in os.environ if name.startswith("PREFECT_")} - {*QUIET, "PREFECT_HOME"}
    spoken = any(file.is_file() and word in file.read_bytes() for file, word in {home / "profiles.toml": b"", **SETTINGS}.items())
    return None if told or spoken or not home.name else home / "storage"


def _result_storage() -> Any:
    """Where Prefect keeps results: asked of a server that is named, since without one Prefect would start one for the answer."""
    from prefect.filesystems import LocalFileSystem
    from prefect.results import get_default_result_storage
    from prefect.settings import get_current_settings

    settings, ask = get_current_settings(), cast(Any, get_default_result_storage)
    if settings.api.url or settings.results.default_storage_block:
        return ask(_sync=True)
    return LocalFileSystem(basepath=str(settings.results.local_storage_path))


def is_cached(key: str, workspace: Workspace) -> bool:
    """Whether a result is held under the key and its artifact is there, undamaged; a damaged one is rebuilt, not trusted."""
    ref = cached_ref(key, workspace)
    if ref is None:
        return False
    try:
        workspace.materialize(ref)
        return workspace.is_stored(ref)
    except (IntegrityError, ServiceError):
        return False


def method(spec: Spec) -> str:
    """The words of a spec that name its method, such as 'gptq int8'."""
    names = ("engine", "method", "criterion", "precision", "compute_type", "grid", "split")
    return " ".join(str(getattr(spec, name)) for name in names if hasattr(spec, name) and name not in spec.unread)
