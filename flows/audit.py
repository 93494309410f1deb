"""Looking back: the lineage of a registered version, and the audit of registered models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, IntegrityError
from featherweight.registry.auditing import UNCHECKED, Finding, audit_model
from featherweight.registry.commit import Cell
from featherweight.registry.lineage import Lineage, Verdict, of_version, verify
from featherweight.registry.lineage_page import write_lineage_page
from featherweight.registry.out_of_band import look, out_of_step
from featherweight.registry.registry import Registry
from featherweight.registry.versions import RegisteredModel, parse_reference
from featherweight.store.workspace import Workspace
from featherweight.system.user import user_name
from featherweight.visible import in_lines, visible

RESULT = "result.json"


@dataclass(frozen=True)
class Audit:
    """A lineage and, where asked for, what verifying it found. behind: what in MLflow does not follow the history, in a line."""

    lineage: Lineage
    verdicts: tuple[Verdict, ...]
    behind: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        told = {"verdicts": [asdict(verdict) for verdict in self.verdicts], "behind": self.behind}
        return {**json.loads(self.lineage.to_json()), **told}

    def to_text(self) -> str:
        """The lineage, then one line per verified part."""
        lines = [f"{v.state:8} {v.part}{f'  {v.reason}' if v.reason else ''}" for v in self.verdicts]
        behind = ["", self.behind] if self.behind else []
        return "\n".join([self.lineage.to_text(), *map(visible, [*(["", "verified:", *lines] if lines else []), *behind])])

    def raise_if_wrong(self) -> None:
        """Raise IntegrityError naming the parts that are not what they were, and those that are gone."""
        wrong = [f"{verdict.part} is {verdict.state}" for verdict in self.verdicts if verdict.state != "ok"]
        if wrong:
            raise IntegrityError(f"not what was registered: {', '.join(wrong)}")


def audit(workspace: Workspace, reference: str, check: bool, page: Path | None = None) -> Audit:
    """The lineage of a registered version, verified where `check`; nothing is changed. Raises GateError for no such version.

    page: where to write it as a page.
    """
    registry = Registry(workspace.tracking_uri)
    registry.check()
    model, version = parse_reference(reference, "champion")
    seen = registry.model(model)
    found = of_version(registry, seen, seen.pick(version))
    verdicts = tuple(verify(found, registry, seen)) if check else ()
    if page is not None:
        findings = [Finding(model, found.version, one.part, one.state, one.reason) for one in verdicts]
        write_lineage_page(page, f"{model}/{found.version}", findings, [found])
    return Audit(found, verdicts, out_of_step(seen))


@dataclass(frozen=True)
class RegistryAudit:
    """What an audit of registered models found. repaired: what was mended before it, in words."""

    findings: tuple[Finding, ...]
    repaired: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"ok": not self.wrong, "findings": [asdict(one) for one in self.findings], "repaired": list(self.repaired)}

    def to_text(self) -> str:
        """A line for each thing that is not ok, by class, and how many are."""
        order = ("altered", "missing", "foreign", "out of step")
        rows = sorted(self.wrong, key=lambda one: (order.index(one.state), one.model, one.version))
        lines = [f"{row.state:<12}{_where(row)}: {row.part}{f'  {row.reason}' if row.reason else ''}" for row in rows]
        unchecked = sum(one.reason == UNCHECKED for one in self.findings)
        held = (
            [f"signatures of {unchecked} versions not looked at: no key is trusted here (`featherweight keys`)"]
            if unchecked
            else []
        )
        return in_lines([*self.repaired, *lines, *held, f"{len(self.findings) - len(rows)} ok, {len(rows)} not"])

    @property
    def wrong(self) -> list[Finding]:
        """Everything that is not ok."""
        return [one for one in self.findings if one.state != "ok"]

    def raise_if_wrong(self) -> None:
        """Raise IntegrityError where anything is not ok."""
        if self.wrong:
            first, more = self.wrong[0], len(self.wrong) - 1
            others = f", and {more} more finding{'s' if more > 1 else ''}" if more else ""
            raise IntegrityError(f"{_where(first)}: {first.part} is {first.state}{others}")


def _where(finding: Finding) -> str:
    return f"{finding.model}/{finding.version}" if finding.version else finding.model


def audit_registry(workspace: Workspace, name: str, repair: bool, page: Path | None = None) -> RegistryAudit:
    """Audit one registered model, or all for ''. Nothing is changed, but where `repair` says so.

    page: where to write what was found, with the lineage of every version that has one. repair: first record what was moved in
    MLflow, take unreadable history entries out, let what is left of a cut history count, and complete what follows from it.
    """
    registry = Registry(workspace.tracking_uri)
    registry.check()
    names = [parse_reference(name, "champion")[0]] if name else registry.models()
    repaired = [line for one in names for line in _repair(registry, one)] if repair else []
    findings = tuple(finding for one in names for finding in audit_model(registry, one))
    if page is not None:
        write_lineage_page(page, name or "all registered models", findings, list(_lineages(registry, names)))
    return RegistryAudit(findings, tuple(repaired))


def _lineages(registry: Registry, names: Iterable[str]) -> Iterator[Lineage]:
    """The lineage of every version of the models, where it can be believed; the findings name the others."""
    for seen in map(registry.model, names):
        for version in reversed(list(seen.versions.values())):
            with suppress(FeatherweightError):
                yield of_version(registry, seen, version)


def _repair(registry: Registry, name: str) -> Iterator[str]:
    """Mend what follows from the history of a model, and the history; a line for each thing that was."""
    behind = _behind(registry.model(name))
    moved = look(registry, name)[1]
    if moved:
        yield f"{name}: {moved.to_text()}"
    for number in registry.quarantine(name):
        why = "was not readable, or no trusted key signed it"
        yield f"{name}: history entry {number} is out, it {why}; its text is in the model's tag quarantined.{number}"
    behind |= _behind(registry.model(name))
    entry = registry.repair(name, user_name())
    if entry is not None:
        yield f"{name}: entry {entry.number}, {entry.told()}"
    registry.settle(name)
    yield from (f"{name}: {cell.told} follows the history again" for cell in behind)


def _behind(seen: RegisteredModel) -> dict[Cell, str | None]:
    """What a writer that stopped left to be completed; what somebody moved is told by the look."""
    return {cell: value for cell, value in seen.behind() if cell not in seen.out_of_band()}
