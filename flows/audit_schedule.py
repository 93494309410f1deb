"""The audit of a registry as a flow, for a schedule: it fails where anything differs, and a notification tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from featherweight.store.workspace import Workspace
from flows.audit import audit_registry


@flow(name="audit", flow_run_name="audit {model}", persist_result=False, validate_parameters=False)
def audit_flow(model: str = "", workspace: str = ".featherweight") -> dict[str, Any]:
    """Audit a registered model, all where none is named. Raises IntegrityError that names what differs."""
    found = audit_registry(Workspace.at(Path(workspace)), model, repair=False)
    found.raise_if_wrong()
    return found.to_dict()
