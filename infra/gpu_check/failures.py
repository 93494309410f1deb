"""For pytest (-p infra.gpu_check.failures): a failure is told at once, so that a run that is stopped has told its own."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line of a test that failed, from the process that gathers the reports of all workers."""
    if not report.failed or "PYTEST_XDIST_WORKER" in os.environ:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr)
    print(f"\nfailed {report.nodeid} ({report.when}): {said[:600]!r}", flush=True)
