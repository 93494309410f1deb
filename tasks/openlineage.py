"""Stage runs told to OpenLineage as they begin and end, where FEATHERWEIGHT_OPENLINEAGE names a file or a server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from featherweight.errors import ServiceError
from featherweight.recipe.nodes import Node
from featherweight.registry.openlineage import Kind, emit, stage_event
from featherweight.store.artifact import ArtifactRef
from tasks.parent_run import ParentRun

TARGET = "FEATHERWEIGHT_OPENLINEAGE"


@contextmanager
def told_to_openlineage(
    node: Node, inputs: Mapping[str, ArtifactRef], parent: ParentRun, run_id: str
) -> Iterator[Callable[[str], None]]:
    """Tell begin and end of a block; it calls what it is given with the digest of what it made.

    A server that is away costs no stage: what it missed is in the lineage, and `featherweight lineage --openlineage` sends it.
    """
    target, made = os.environ.get(TARGET, ""), [""]
    if not target:
        yield made.append
        return
    recipe = parent.tags.get("featherweight.recipe", "")
    digests = {name: ref.digest for name, ref in inputs.items()}
    told: Any = {"run_id": run_id, "job": f"{recipe}/{node.id}", "inputs": digests, "parent": (parent.run_id, recipe)}
    _tell("START", target, told)
    try:
        yield made.append
    except BaseException:
        _tell("FAIL", target, told)
        raise
    _tell("COMPLETE", target, {**told, "made": made[-1]})


def _tell(kind: Kind, target: str, told: dict[str, Any]) -> None:
    try:
        emit([stage_event(kind, at=datetime.now(UTC).isoformat(), **told)], target)
    except ServiceError as error:
        logging.getLogger(__name__).warning("%s", error)
