"""The re-measurement of a champion as a flow, for a schedule: it fails where the champion has drifted, and a notification tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from featherweight.store.workspace import Workspace
from flows.optimize import optimize_flow
from flows.remeasure import rebuilt, remeasure


@flow(name="remeasure", flow_run_name="remeasure {model}", persist_result=False, validate_parameters=False)
def remeasure_flow(model: str, text: str = "", rebuild: bool = False, workspace: str = ".featherweight") -> dict[str, Any]:
    """Measure a champion again, on fresh text where some is named. Raises GateError that says what drifted.

    rebuild: optimize by its own recipe once more where that may win; it is well then if another version is champion since.
    """
    place = Workspace.at(Path(workspace))
    found = remeasure(place, model, text)
    if rebuild and found.rebuild_may_win:

        def again(recipe: Path, overrides: list[str]) -> str:
            return str(optimize_flow(str(recipe), overrides, workspace=workspace)["registered"])

        found = rebuilt(place, found, again)
    found.raise_if_drifted()
    return found.to_dict()
