"""A watcher that may be killed at any moment: `python -m tests.support.watcher SOURCE RECIPE WORKSPACE LEDGER`.

It looks again and again, as `featherweight watch --once` does, until the ledger holds the file `stop`. The optimization is a
stand-in that reads the whole checkpoint and takes a moment; the ledger is told when it begins and when it is done, and when
somebody else works on the same content at the same time.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Any

LEDGER = "FEATHERWEIGHT_TEST_LEDGER"


def optimize(
    recipe: str,
    overrides: list[str] | None = None,
    source: str | None = None,
    workspace: str = ".featherweight",
    tags: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The stand-in."""
    from featherweight.checkpoint import s3
    from featherweight.checkpoint.identity import content_identity
    from tasks.claim_runs import sign_own_run

    sign_own_run()
    (identity,) = (tags or {}).values()
    with Path(os.environ[LEDGER], f"{identity}.lock").open("w") as turn:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"overlap {identity}")
        note(f"begin {identity} {os.getpid()}")
        if content_identity(s3.listing(str(source))) != identity:
            note(f"other {identity}")
        time.sleep(0.5)
        note(f"end {identity}")
    return {"winner": "stand-in"}


def note(line: str) -> None:
    """A line of the ledger, whole whoever writes at the same time."""
    with Path(os.environ[LEDGER], "log").open("a") as log:
        log.write(f"{line}\n")


def main(source: str, recipe: str, workspace: str, ledger: str) -> None:
    os.environ[LEDGER] = ledger
    import flows.watch
    from featherweight.errors import ServiceError
    from flows.watch import run_due, watch_flow
    from flows.watch_schedule import parameters_of
    from tasks.claims import Patience

    flows.watch.optimize_flow.fn = optimize  # with all that the real flow is told beside
    flows.watch.require_store = lambda *_: None
    patience = Patience(tries=50, crashes=50, backoff_s=0.5, pending_s=15)
    told = parameters_of(source, Path(recipe), (), Path(workspace), "every", 0.3, patience)
    flows.watch.optimize_flow.to_deployment(told["deployment"].partition("/")[2]).apply()
    while not Path(ledger, "stop").exists():
        try:
            run_due(watch_flow(**told), told["deployment"])
        except ServiceError as error:
            note(f"away {type(error).__name__}")
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
