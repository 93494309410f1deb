"""For pytest (-p infra.gpu_check.failures), where a bundle runs.

A failure is told at once, so that a run that is stopped has told its own. A test that wants a package which the bundle leaves out
is skipped with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.util import find_spec

import pytest

from infra.gpu_check.bundle import NOT_NEEDED

LEFT_OUT = {name.replace("-", "_") for name in NOT_NEEDED}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line of a test that failed, from the process that gathers the reports of all workers."""
    if not report.failed or "PYTEST_XDIST_WORKER" in os.environ:
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr)
    print(f"\nfailed {report.nodeid} ({report.when}): {said[:600]!r}", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    with _Skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with _Skipping():
        return (yield)


class _Skipping:
    """Turns the want of a package that the bundle leaves out into a skip."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name in LEFT_OUT and find_spec(error.name) is None:
            pytest.skip(f"the bundle leaves out {error.name}")
