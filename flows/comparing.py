"""Two versions side by side."""

from __future__ import annotations

from dataclasses import replace

from featherweight.registry.comparing import VersionComparison, compare
from featherweight.registry.out_of_band import out_of_step
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace


def compared(workspace: Workspace, a: str, b: str) -> VersionComparison:
    """Two registered versions; a bare number or alias is one of the first's model. Raises GateError for unknown ones."""
    registry = Registry(workspace.tracking_uri)
    registry.check()
    model, version = parse_reference(a, "champion")
    beside, other = parse_reference(f"{model}/{b}" if b.isdigit() else f"{model}{b}" if b.startswith("@") else b, "champion")
    seen = registry.model(model)
    others = seen if beside == model else registry.model(beside)
    notes = dict.fromkeys(filter(None, map(out_of_step, (seen, others))))
    return replace(compare(registry, seen.pick(version), others.pick(other)), notes=tuple(notes))
