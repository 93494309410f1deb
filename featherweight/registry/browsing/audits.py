"""Audits that were asked for: each reads every byte, so it runs in a thread, and its findings stay until the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from featherweight.errors import told
from featherweight.registry.auditing import Finding


@dataclass(frozen=True)
class AuditLine:
    """How the audit of a model stands. began, ended: UTC, '' for not yet. fault: why it could not be made. head: entry it knew."""

    began: str
    head: int
    ended: str = ""
    findings: tuple[Finding, ...] = ()
    fault: str = ""

    @property
    def wrong(self) -> list[Finding]:
        """Everything that is not ok."""
        return [one for one in self.findings if one.state != "ok"]

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.ended:
            return f"running since {self.began}"
        if self.fault:
            return f"not made: {self.fault}"
        return f"{len(self.wrong)} of {len(self.findings)} not ok" if self.wrong else f"all {len(self.findings)} ok"


class Audits:
    """The latest audit of each model since this began. audit: finds everything of a model."""

    def __init__(self, audit: Callable[[str], Sequence[Finding]]) -> None:
        self._audit, self._lock = audit, threading.Lock()
        self._lines: dict[str, AuditLine] = {}

    def of(self, model: str) -> AuditLine | None:
        """The latest, None where nobody asked for one."""
        return self._lines.get(model)

    def begin(self, model: str, head: int) -> None:
        """Audit a model, unless that is being done."""
        with self._lock:
            known = self._lines.get(model)
            if known and not known.ended:
                return
            self._lines[model] = AuditLine(_now(), head)
        threading.Thread(target=self._run, args=(model,), daemon=True).start()

    def _run(self, model: str) -> None:
        begun = self._lines[model]
        try:
            findings, fault = tuple(self._audit(model)), ""
        except Exception as error:  # the page tells it; an audit meets whatever is stored
            findings, fault = (), told(error)
        self._lines[model] = replace(begun, ended=_now(), findings=findings, fault=fault)


def _now() -> str:
    return datetime.now(UTC).strftime("%H:%M:%SZ")
