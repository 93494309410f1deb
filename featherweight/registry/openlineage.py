"""Lineage as OpenLineage events: a stage run is a run of a job, an artifact a data set that is named by its digest."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from featherweight.errors import ServiceError, ToolchainError, one_line
from featherweight.masking import masked
from featherweight.registry.lineage import LineageGraph

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

NAMESPACE = "featherweight"
PRODUCER = "https://github.com/OpenLineage/OpenLineage/tree/main/client/python"
Kind = Literal["START", "COMPLETE", "FAIL"]


def stage_event(
    kind: Kind, *, run_id: str, job: str, at: str, inputs: Mapping[str, str], made: str = "", parent: tuple[str, str] = ("", "")
) -> RunEvent:
    """One event of a stage run. at: ISO time. inputs: digests by name. made: of its artifact. parent: run id and job of its run."""
    try:
        from openlineage.client import event_v2 as events
        from openlineage.client.facet_v2 import dataset_version_dataset, parent_run
    except ImportError as error:
        raise ToolchainError("OpenLineage's client is not installed; pip install 'featherweight[standards]'") from error

    def facets(digest: str) -> dict[str, Any]:
        return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=digest, producer=PRODUCER)}

    run, name = events.Run(_run(run_id)), events.Job(NAMESPACE, job)
    if parent[0]:
        above = parent_run.Run(_run(parent[0])), parent_run.Job(NAMESPACE, parent[1])
        run.facets = {"parent": parent_run.ParentRunFacet(*above, producer=PRODUCER)}
    read = [events.InputDataset(NAMESPACE, f"sha256:{digest}", facets(digest)) for digest in dict.fromkeys(inputs.values())]
    written = [events.OutputDataset(NAMESPACE, f"sha256:{made}", facets(made))] if made else []
    return events.RunEvent(
        eventTime=at, producer=PRODUCER, run=run, job=name, eventType=events.RunState[kind], inputs=read, outputs=written
    )


def graph_events(graph: LineageGraph) -> Iterator[RunEvent]:
    """Begin and end of every stage run of a lineage, in order."""
    recipe = str(graph.recipe_tree.get("name", graph.variant))
    for node in graph.nodes:
        told: Any = {"run_id": node.run_id, "job": f"{recipe}/{node.id}", "inputs": node.parents, "parent": (graph.run_id, recipe)}
        yield stage_event("START", at=node.started, **told)
        yield stage_event("COMPLETE", at=node.finished, made=node.digest, **told)


def emit(events: Iterable[RunEvent], target: str) -> int:
    """Send events to a server (http or https), or append them to a file, a line each; returns how many. Raises ServiceError."""
    from openlineage.client import OpenLineageClient

    remote = target.startswith(("http://", "https://"))
    transport = {"type": "http", "url": target} if remote else {"type": "file", "log_file_path": target, "append": True}
    count = 0
    try:
        client = OpenLineageClient(config={"transport": transport})
        for event in events:
            client.emit(event)
            count += 1
    except (ServiceError, ToolchainError):
        raise
    except Exception as error:  # whatever the transport raises
        raise ServiceError(f"OpenLineage at {masked(target)} took {count} events and then failed: {one_line(error)}") from error
    return count


def _run(id: str) -> str:
    """MLflow's run ids are UUIDs without dashes; whatever else names a run becomes one."""
    try:
        return str(uuid.UUID(id))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, id))
