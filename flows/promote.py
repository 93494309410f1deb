"""Promotion and rollback by hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from featherweight.errors import RecipeError
from featherweight.registry.history import GateResult, StageName
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace
from featherweight.system.user import user_name
from tasks.promote import promote as promote_version
from tasks.promote import rollback as roll_back


@dataclass(frozen=True)
class Moved:
    """What a promotion or a rollback did."""

    model: str
    version: str
    variant: str
    stage: str
    changed: bool
    reason: str
    gates: tuple[GateResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_text(self) -> str:
        """One line, and one for each gate."""
        verb = "is now in" if self.changed else "stays in"
        first = f"{self.model} version {self.version} ({self.variant}) {verb} {self.stage}: {self.reason}"
        return "\n".join([first, *(f"  {'passed' if g.passed else 'refused'}  {g.gate}: {g.reason}" for g in self.gates)])


def promote(workspace: Workspace, reference: str, to: str, why: str, force: bool) -> Moved:
    """Move a version to a stage through its gates. Raises GateError with the reason where one refuses."""
    if to not in get_args(StageName):
        raise RecipeError(f"unknown stage '{to}'; known: {', '.join(get_args(StageName))}")
    model, version = parse_reference(reference, "challenger")
    registry = Registry(workspace.tracking_uri)
    done = promote_version(registry, model, version, to, who=user_name(), why=why, force=force)  # type: ignore[arg-type]
    now = done.version
    return Moved(model, now.version, now.variant, now.stage, done.changed, done.reason, done.gates)


def rollback(workspace: Workspace, reference: str, why: str) -> Moved:
    """Make the previous champion the champion again. Raises GateError where there is none."""
    model, _ = parse_reference(reference, "champion")
    now = roll_back(Registry(workspace.tracking_uri), model, user_name(), why)
    return Moved(model, now.version, now.variant, now.stage, True, why)


def parse_reference(reference: str, default: str) -> tuple[str, str]:
    """'name', 'name@alias', 'name/3' or either with 'models:/' in front: (name, alias or number)."""
    plain = reference.removeprefix("models:/")
    for mark in ("@", "/"):
        name, found, version = plain.partition(mark)
        if found:
            return name, version
    return plain, default
