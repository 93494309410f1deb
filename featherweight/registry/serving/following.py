"""Which version is served: one that is named, or whichever an alias names, verified before it answers anybody."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from featherweight.errors import FeatherweightError, GateError, IntegrityError, told
from featherweight.registry.keys import Keys
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.serving.backend import Backend
from featherweight.registry.serving.front import Front
from featherweight.registry.serving.verified_copy import private_folder, verified_copy
from featherweight.registry.versions import RegisteredModel
from featherweight.registry.witness import witnessed_fault

DRAIN_S = 600.0
RETRY_S = 60.0
MODEL = "model"

Tell = Callable[[str, str], None]
"""Is told what happens: 'ready', 'switched', 'kept', 'restarted' or 'note', and the same in words."""


@dataclass
class Failure:
    """A version that could not be served: how often, and when it is tried again (monotonic seconds)."""

    times: int = 0
    again: float = 0.0


@dataclass
class Follower:
    """Serves `reference` of a model, a version's number or an alias, through `front`.

    Where an alias names another version, that one is copied, verified, started and asked beside the one that answers; then it
    answers every new request, and the former ends with its last. Where any of this fails, the former stays.
    root: where private folders are made.
    """

    registry: Registry
    model: str
    reference: str
    front: Front
    root: Path
    tell: Tell
    active: Backend | None = None
    _said: str = ""
    _failed: dict[tuple[str, str], Failure] = field(default_factory=dict)

    def begin(self) -> Backend:
        """Serve what is named now. Raises GateError, IntegrityError or StageError where that cannot be."""
        seen, version = self._wanted()
        self.active = self._started(seen, version)
        self.front.switch(self.active)
        self._note("")
        return self.active

    def look(self) -> None:
        """Follow the alias, and start a server anew that died; whatever fails, what answers goes on answering."""
        try:
            self._look()
        except Exception as error:  # a registry that is away, or anything else, is no reason to end what serves
            self._note(f"{self._serving()} keeps serving: {told(error)}", "kept")

    def revive(self) -> None:
        """Start the server of the active version anew where it died."""
        dead = self.active
        if dead is None or dead.alive or not self._due(dead.copy.version):
            return
        self.tell("note", f"the server of version {dead.copy.version.version} ended; it is started anew")
        try:
            self._replace(self._up(Backend(dead.copy)), keep_copy=True)
            self._note("", "")
            self.tell("restarted", f"version {dead.copy.version.version} serves again")
        except Exception as error:  # of a copy that was deleted too: requests are told so, and the alias is still followed
            self._fail(dead.copy.version)
            self._note(f"version {dead.copy.version.version} does not start again: {told(error)}", "note")

    def close(self, patience_s: float = DRAIN_S) -> None:
        """End what serves, once it has answered what it was asked."""
        if self.active is not None:
            self._end(self.active, patience_s, keep_copy=False)
            self.active = None

    def _look(self) -> None:
        seen, version = self._wanted()
        now = self.active.copy.version if self.active else None
        if now is not None and (now.version, now.digest) == (version.version, version.digest):
            self._note("")
            return
        if not self._due(version):
            return
        try:
            backend = self._started(seen, version)
        except FeatherweightError as error:
            self._fail(version)
            self._note(f"{self._serving()} keeps serving: version {version.version} cannot: {told(error)}", "kept")
            return
        again = self._wanted()[1]
        if (again.version, again.digest) != (version.version, version.digest):  # taken back meanwhile: nobody is to get it
            self._end(backend, 0, keep_copy=False)
            return
        self._failed.clear()
        was = self._serving()
        self._replace(backend, keep_copy=False)
        self._note("")
        self.tell("switched", f"version {version.version} ({version.variant}) serves, {was} has answered its last request")

    def _wanted(self) -> tuple[RegisteredModel, RegisteredVersion]:
        """The model, with what somebody moved in MLflow recorded and undone or kept, and the version that is to be served."""
        seen, moved = look(self.registry, self.model)
        if moved:
            self.tell("note", moved.to_text())
        return seen, named(seen, self.reference)

    def _started(self, seen: RegisteredModel, version: RegisteredVersion) -> Backend:
        """A server of a version that has answered, from a verified copy of its files."""
        home = private_folder(self.root)
        try:
            return self._up(Backend(verified_copy(self.registry, seen, version, home / MODEL)))
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise

    def _up(self, backend: Backend) -> Backend:
        try:
            backend.wait()
        except BaseException:
            backend.close()
            raise
        return backend

    def _replace(self, backend: Backend, keep_copy: bool) -> None:
        before, self.active = self.active, backend
        self.front.switch(backend)
        if before is not None:
            self._end(before, DRAIN_S, keep_copy)

    def _end(self, backend: Backend, patience_s: float, keep_copy: bool) -> None:
        backend.drain(patience_s)
        backend.close()
        self.front.forget(backend)
        if not keep_copy:
            shutil.rmtree(backend.copy.folder.parent, ignore_errors=True)

    def _serving(self) -> str:
        return f"version {self.active.copy.version.version}" if self.active else "nothing"

    def _note(self, text: str, event: str = "note") -> None:
        """Tell something once, not at every look."""
        self.front.note(text)
        if text and text != self._said:
            self.tell(event, text)
        self._said = text

    def _due(self, version: RegisteredVersion) -> bool:
        failure = self._failed.get((version.version, version.digest))
        return failure is None or time.monotonic() >= failure.again

    def _fail(self, version: RegisteredVersion) -> None:
        """A version that failed is tried again after one minute, two, four, up to an hour: it may be the machine's fault."""
        failure = self._failed.setdefault((version.version, version.digest), Failure())
        failure.again = time.monotonic() + min(3600.0, RETRY_S * 2**failure.times)
        failure.times += 1


def named(seen: RegisteredModel, reference: str) -> RegisteredVersion:
    """The version that a number or an alias names, fit to be served. Raises GateError, IntegrityError."""
    seen.require_whole()
    if fault := witnessed_fault(seen.born, seen.history, Keys.here()):
        raise IntegrityError(f"{fault}; see `featherweight audit {seen.model}`")
    if not reference.isdigit() and reference not in seen.aliases:
        raise GateError(f"model '{seen.model}' has no {reference} (`featherweight promote {seen.model}/NUMBER`)")
    return seen.pick(reference)
