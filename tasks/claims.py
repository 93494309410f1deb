"""Claims: what became of each arrival under a recipe, and what is to be done next.

A claim is the optimization of one content by one recipe. Its tries are Prefect flow runs (tasks/claim_runs.py), each made once
however many watchers ask for it: the try's number is part of the idempotency key. So nothing here needs a lock, and whoever looks
at a stale picture asks for a try that is there already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from featherweight.recipe.recipe import Recipe
from featherweight.store.artifact import content_digest

Status = Literal["new", "queued", "running", "unapproved", "done", "failed", "crashed", "quarantined", "cancelled"]
LONGEST_WAIT = timedelta(hours=1)


@dataclass(frozen=True)
class Patience:
    """How long what does not go well is borne with.

    tries: of an optimization that fails. crashes: of one whose process dies, which is seldom the checkpoint's fault. backoff_s:
    the wait before the second try, four times as long before each further. pending_s: for a process that was to start.
    silent_s: for one on another machine that sends no heartbeats; None for three of Prefect's intervals.
    """

    tries: int = 3
    crashes: int = 10
    backoff_s: float = 60.0
    pending_s: float = 120.0
    silent_s: float | None = None


@dataclass(frozen=True)
class Try:
    """One flow run. state: Prefect's type of it. since: when it came into it, or for what time it is scheduled."""

    number: int
    run_id: str
    state: str
    since: datetime
    reason: str = ""
    process: str = ""
    source: str = ""


@dataclass(frozen=True)
class Claim:
    """The tries of one key, by number."""

    key: str
    recipe: str
    tries: tuple[Try, ...] = field(default=())

    @property
    def last(self) -> Try | None:
        """The newest try."""
        return self.tries[-1] if self.tries else None

    def count(self, state: str) -> int:
        """How many tries ended in a state."""
        return sum(one.state == state for one in self.tries)

    def status(self, patience: Patience) -> Status:
        """How it stands."""
        last = self.last
        if last is None:
            return "new"
        if last.state in ("FAILED", "CRASHED"):
            spent = self.count("FAILED") >= patience.tries or self.count("CRASHED") >= patience.crashes
            return "quarantined" if spent else "failed" if last.state == "FAILED" else "crashed"
        known: dict[str, Status] = {"COMPLETED": "done", "SCHEDULED": "queued", "PAUSED": "unapproved"}
        known |= {"CANCELLED": "cancelled", "CANCELLING": "cancelled"}
        return known.get(last.state, "running")

    def next_try(self, patience: Patience, now: datetime) -> tuple[int, datetime] | None:
        """Number and time of the try that is due to be made; None where nothing is to be done.

        A first crash is followed up at once: whoever killed the process may have killed the watcher too.
        """
        last = self.last
        if last is None:
            return 1, now
        if self.status(patience) not in ("failed", "crashed"):
            return None
        before = self.count(last.state) - (last.state == "CRASHED")
        wait = timedelta(seconds=patience.backoff_s) * 4 ** min(before - 1, 10) if before else timedelta()
        return last.number + 1, last.since + min(wait, LONGEST_WAIT)

    def to_dict(self, patience: Patience) -> dict[str, Any]:
        """JSON-able form."""
        last = self.last
        told = {"status": self.status(patience), "recipe": self.recipe, "key": self.key, "tries": len(self.tries)}
        if last is None:
            return told
        return {**told, "source": last.source, "flow_run": last.run_id, "since": last.since.isoformat(), "reason": last.reason}


def claim_key(recipe: Recipe, identity: str) -> str:
    """The key of an arrival's optimization: what the recipe says but for where its checkpoint comes from, and the content.

    Of what it does not say the defaults are left out: a later version may have more of them, and what was optimized stays so.
    """
    told = recipe.model_dump(mode="json", exclude_unset=True)
    told["checkpoint"].pop("source", None)
    told["checkpoint"].pop("train", None)
    return content_digest([told, identity])


def is_lost(last: Try, patience: Patience, running: bool | None, heard: datetime, now: datetime) -> bool:
    """Whether a try that Prefect takes for begun has lost its process.

    running: whether its process runs, None where nobody here can know. heard: its last sign of life.
    """
    if last.state not in ("PENDING", "RUNNING") or running:
        return False
    if running is False:
        return True
    allowed = patience.pending_s if last.state == "PENDING" else patience.silent_s or 0.0
    return now - heard > timedelta(seconds=allowed)
