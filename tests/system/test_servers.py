"""Servers that this process starts: one that ended is told from one that has not answered in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.errors import ServiceError
from featherweight.system.servers import await_url

NOBODY = "http://127.0.0.1:9/health"


def test_a_server_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\nno memory\n")
    with (
        subprocess.Popen([sys.executable, "-c", ""]) as process,
        pytest.raises(ServiceError, match=r"did not start; .*: no memory$"),
    ):
        await_url(NOBODY, process, "test", log)


def test_a_server_that_does_not_answer_is_given_up_after_the_time_that_it_is_given(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(ServiceError, match="the test server did not start within 1 s; see "):
            await_url(NOBODY, process, "test", tmp_path / "log", timeout_s=1)
    finally:
        process.kill()
        process.wait()
