"""Register a winner with its lineage."""

from __future__ import annotations

from featherweight.errors import GateError, IntegrityError
from featherweight.registry.lineage import LineageGraph
from featherweight.registry.registry import RegisteredVersion, Registry, WinnerRecord


def register(registry: Registry, winner: WinnerRecord) -> RegisteredVersion:
    """The winner's registered version, new or the one that holds its digest already.

    Raises GateError for a winner without numbers, IntegrityError where its lineage is that of another artifact.
    """
    if not winner.metrics:
        raise GateError(f"variant {winner.variant} has no measurement; evaluate it before registering")
    graph = LineageGraph.from_json(winner.lineage)
    if graph.served != winner.digest:
        raise IntegrityError(f"the lineage is of {graph.served[:12]}, the winner {winner.variant} is {winner.digest[:12]}")
    return registry.register(winner)
