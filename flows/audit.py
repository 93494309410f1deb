"""Looking back: the table of a finished optimization, and the lineage of a registered version."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.errors import IntegrityError
from featherweight.registry.lineage import Lineage, Verdict, from_registry, verify
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace

RESULT = "result.json"


@dataclass(frozen=True)
class Audit:
    """A lineage and, where asked for, what verifying it found."""

    lineage: Lineage
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**json.loads(self.lineage.to_json()), "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    def to_text(self) -> str:
        """The lineage, then one line per verified part."""
        lines = [f"{v.state:8} {v.part}{f'  {v.reason}' if v.reason else ''}" for v in self.verdicts]
        return "\n".join([self.lineage.to_text(), *(["", "verified:", *lines] if lines else [])])

    def raise_if_altered(self) -> None:
        """Raise IntegrityError naming the parts that are not what they were."""
        altered = [verdict.part for verdict in self.verdicts if verdict.state == "altered"]
        if altered:
            raise IntegrityError(f"altered since it was registered: {', '.join(altered)}")


def audit(workspace: Workspace, reference: str, check: bool) -> Audit:
    """The lineage of a registered version, verified where `check`. Raises GateError where there is no such version."""
    registry = Registry(workspace.tracking_uri)
    registry.check()
    found = from_registry(registry, *parse_reference(reference, "champion"))
    return Audit(found, tuple(verify(found, registry)) if check else ())
