"""What depends on a checkpoint, on data or on a library."""

from __future__ import annotations

from featherweight.errors import RecipeError
from featherweight.registry.impact import Impact, Kind, impact
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace


def depending(workspace: Workspace, checkpoint: str, data: str, library: str) -> Impact:
    """What depends on the one of the three that is given. Raises RecipeError for none, or more."""
    asked: dict[Kind, str] = {"checkpoint": checkpoint, "data": data, "library": library}
    given = [(kind, wanted) for kind, wanted in asked.items() if wanted]
    if len(given) != 1:
        raise RecipeError("give one of --checkpoint, --data and --library")
    registry = Registry(workspace.tracking_uri)
    registry.check()
    return impact(registry, *given[0])
