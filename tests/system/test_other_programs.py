"""What other programs take of the processors, told apart from what this one and its children take."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from featherweight.system.other_programs import ProcessorTimes

BEFORE = ProcessorTimes(clock=100.0, busy=1000.0, own=50.0, processors=4)


@pytest.mark.parametrize(
    ("busy", "own", "share"),
    [(1040.0, 90.0, 0.0), (1030.0, 60.0, 0.5), (1020.0, 50.0, 0.5), (1000.0, 50.1, 0.0), (1400.0, 50.0, 1.0)],
    ids=["all of it is ours", "half and half", "ours waits", "counters are coarse", "never more than all"],
)
def test_what_is_not_ours_is_others(busy: float, own: float, share: float) -> None:
    assert replace(BEFORE, clock=110.0, busy=busy, own=own).others_since(BEFORE) == pytest.approx(share)
    assert BEFORE.others_since(BEFORE) == 0.0


def test_a_child_is_ours_while_it_runs_and_after_it_has_ended() -> None:
    before = ProcessorTimes.read()
    spinning = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spinning], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = ProcessorTimes.read()
        child.communicate(b"\n")
    after = ProcessorTimes.read()
    assert during.own - before.own >= 0.35
    assert after.own >= during.own and after.busy - before.busy >= 0.3 and after.processors >= 1
