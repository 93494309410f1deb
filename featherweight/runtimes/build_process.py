"""A converter or compiler in a process of its own, which says in lines of JSON what it does, and at the end that it is done."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

from featherweight.errors import one_line
from featherweight.progress import Progress
from featherweight.system.child_process import Channel, ChildProcess
from featherweight.system.environment import without_secrets

LIMIT_S = 3600.0
"""Time that it has."""


def other_python() -> dict[str, str]:
    """The environment of another Python than ours, without the network."""
    return {name: value for name, value in without_secrets().items() if not name.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}


def run_build(
    name: str, done: str, command: list[str], env: Mapping[str, str], progress: Progress, limit_s: float = LIMIT_S
) -> str | None:
    """Run it and pass on each {"note": ...} under `name`; None once it has said `done`, else in one line what became of it."""
    child, doing, deadline = ChildProcess(command, env, dies_with_parent=True), "starting", monotonic() + limit_s
    try:
        while told := child.receive(max(0.0, deadline - monotonic())):
            if done in told:
                return None
            if "error" in told:
                return str(told["error"])
            doing = told["note"]
            progress.note(f"{name}: {doing}")
        return _ending(child, doing)
    except TimeoutError:
        return f"it was ended after its limit of {limit_s:g} s while {doing}"
    finally:
        child.kill()
        child.close()


def _ending(child: ChildProcess, doing: str) -> str:
    """How it ended without a word of what it made, or of an error."""
    memory = ", which Linux does when memory runs out" if child.process.wait() == -signal.SIGKILL else ""
    return f"it ended with {child.ending()}{memory} while {doing}; {child.tail()}"


def build_here(build: Callable[[Path, Path, Channel], None], done: str) -> int:
    """The other side, for a build by this Python: the command line is a checkpoint and a folder; an exit code.

    `build` writes to the folder, and sends {"note": ...} of what begins; {`done`: true} or {"error": ...} is sent for it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    channel = Channel.claim_stdout()
    try:
        build(options.checkpoint, options.out, channel)
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {one_line(error, 400)}"})
        return 1
    channel.send({done: True})
    return 0
