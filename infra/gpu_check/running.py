"""Running checks side by side: each in its own process group with its own limit, timed ones alone, none stopping another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.gpu_check.checks import Check

LAST = 4000


@dataclass
class Result:
    """What became of a check. state: ok, failed, not run."""

    name: str
    state: str
    found: str
    seconds: float = 0.0
    device: str = "cpu"
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Running:
    check: Check
    process: subprocess.Popen[bytes]
    began: float
    log: Path


class Runner:
    """Runs checks until all have ended or `seconds` are over. told: called with each result as it comes."""

    def __init__(self, logs: Path, width: int, seconds: float, told: Callable[[Result], None]) -> None:
        self.logs, self.width, self.told = logs, width, told
        self.ends = time.monotonic() + seconds
        self.results: dict[str, Result] = {}
        self.running: list[_Running] = []
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, checks: Sequence[Check]) -> dict[str, Result]:
        """The result of every check, by its name."""
        waiting = list(checks)
        while waiting or self.running:
            self._end_finished()
            waiting = [check for check in waiting if not self._settled(check)]
            for check in [check for check in waiting if self._may_begin(check, waiting)]:
                if self._has_room(check):
                    waiting.remove(check)
                    self._begin(check)
            time.sleep(0.05)
        return self.results

    def _settled(self, check: Check) -> bool:
        """Whether it needs no process: it is refused, too late, or what it needs did not come."""
        broken = next((name for name in check.after if name in self.results and self.results[name].state != "ok"), None)
        reason = check.reason or (f"{broken} did not end well" if broken else None)
        if reason is None and time.monotonic() > self.ends:
            reason = "no time left"
        if reason:
            self._keep(Result(check.name, "not run", reason, device=check.device))
        return reason is not None

    def _may_begin(self, check: Check, waiting: Sequence[Check]) -> bool:
        """Timed checks come when all others are through."""
        ready = all(name in self.results for name in check.after)
        return ready and (not check.alone or not any(not other.alone for other in waiting))

    def _has_room(self, check: Check) -> bool:
        if check.alone:
            return not self.running
        return len(self.running) < self.width and not any(running.check.alone for running in self.running)

    def _begin(self, check: Check) -> None:
        log = self.logs / f"{check.name.replace('/', '~').replace(' ', '-')}.log"
        environment = os.environ | {"FEATHERWEIGHT_DEVICE": check.device}
        if not check.alone:
            environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.width))}
        with log.open("wb") as written, log.with_suffix(".err").open("wb") as errors:
            process = subprocess.Popen(check.command, stdout=written, stderr=errors, env=environment, start_new_session=True)
        self.running.append(_Running(check, process, time.monotonic(), log))

    def _end_finished(self) -> None:
        for running in list(self.running):
            seconds, code = time.monotonic() - running.began, running.process.poll()
            late = seconds > running.check.limit_s or time.monotonic() > self.ends
            if code is None and not late:
                continue
            _kill(running.process)
            self.running.remove(running)
            self._keep(_result(running, code, seconds))

    def _keep(self, result: Result) -> None:
        self.results[result.name] = result
        self.told(result)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group: engines that it started too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _result(running: _Running, code: int | None, seconds: float) -> Result:
    check = running.check
    if code is None:
        why = (
            f"its limit of {check.limit_s:.0f} s" if seconds > check.limit_s else f"{seconds:.0f} s, since the time for all was up"
        )
        return Result(check.name, "failed", f"stopped after {why}", seconds, check.device)
    said = running.log.read_text(errors="replace").strip().splitlines()
    told = _json(said)
    state, found = ("ok" if code in check.accepted else "failed"), told.get("found") or _summary(told) or (said[-1] if said else "")
    if code < 0:
        found = f"ended by {signal.Signals(-code).name}"
    elif code not in check.accepted and not told:
        errors = running.log.with_suffix(".err").read_text(errors="replace").strip().splitlines()
        found = " | ".join((said[-1:] or [""]) + errors[-2:])[-LAST:]
    return Result(check.name, state, str(found)[:LAST], seconds, check.device, told.get("metrics", told))


def _summary(told: dict[str, Any]) -> str:
    """One line of doctor's findings about GPUs, or of an optimization's winner."""
    about = [one for one in told.get("checks", []) if "gpu" in one["name"].lower() or "cuda" in one["name"].lower()]
    winner = told.get("winner")
    return "; ".join(f"{one['name']}: {one['found']}" for one in about) or (f"winner: {winner}" if winner else "")


def _json(lines: list[str]) -> dict[str, Any]:
    """What a check printed as JSON: one line of it, or all of them."""
    for text in (lines[-1] if lines else "", "\n".join(lines)):
        try:
            tree = json.loads(text)
        except ValueError:
            continue
        if isinstance(tree, dict):
            return tree
    return {}
