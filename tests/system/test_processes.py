"""Processes are told apart from those that had their number before."""

from __future__ import annotations

import subprocess
import sys

import psutil

from featherweight.system.processes import _name_of, has_ended, host_and_pid, is_running, process_name
from tests.support.waiting import all_end


def test_whether_a_process_still_runs() -> None:
    assert is_running(process_name()) is True
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = _name_of(other.pid)
    assert is_running(name) is True
    other.kill()
    assert all_end(psutil.Process(other.pid))
    assert is_running(name) is False  # killed, though nobody has waited for it
    other.wait()
    assert is_running(name) is False


def test_a_number_that_came_again_and_a_place_that_is_elsewhere() -> None:
    place, _, began = process_name().rpartition("|")
    assert is_running(f"{place}|{float(began) - 1000}") is False
    assert is_running(f"another-{process_name()}") is None


def test_who_is_named_by_host_and_number_has_ended_or_not() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = host_and_pid().rpartition(":")[0]
    assert has_ended(f"{host}:{gone.pid}")
    assert not has_ended(host_and_pid())
    assert not any(map(has_ended, (f"another-{host}:{gone.pid}", f"{host}:", "")))
