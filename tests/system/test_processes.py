"""Processes are told apart from those that had their number before."""

from __future__ import annotations

import subprocess
import sys

import psutil

from featherweight.system.processes import GroupWatch, _name_of, has_ended, host_and_pid, is_running, process_name
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


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('there', flush=True); time.sleep(600)"
LEADER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"
OWNER = f"""
import subprocess, sys
from featherweight.system.processes import GroupWatch, end_with_parent
leader = subprocess.Popen([sys.executable, "-c", {LEADER!r}], start_new_session=True, preexec_fn=end_with_parent())
watch = GroupWatch(leader)
print(leader.pid, flush=True)
input()
"""


def test_a_server_that_still_starts_ends_with_who_started_it_and_its_engine_too() -> None:
    """The engine does not hear that the owner was killed, and heeds no SIGTERM."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    said = sorted(owner.stdout.readline().strip() for _ in range(2))
    assert said[1] == "there"
    leader = psutil.Process(int(said[0]))
    group = [leader, *leader.children(recursive=True)]
    assert len(group) == 2
    owner.kill()
    assert all_end(*group)
    owner.communicate()


def test_what_is_ended_in_time_leaves_no_watch() -> None:
    leader = subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    watch = GroupWatch(leader)  # type: ignore[arg-type]
    assert leader.stdout and leader.stdout.readline()
    group = psutil.Process(leader.pid).children()
    watch.end()
    assert all_end(*group)
    assert not [one for one in psutil.Process().children() if str(leader.pid) in one.cmdline()]
    leader.stdout.close()
