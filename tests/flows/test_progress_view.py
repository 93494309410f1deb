"""What a person sees while a plan runs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.reading import load_recipe
from featherweight.system.progress_channel import ProgressChannel
from flows.progress_view import LiveView, NodeState, PlainView, View, _fit, shown
from tests.support.paths import TINY_RECIPE

MESSAGES = [
    ("started", {"node": "checkpoint"}),
    ("step", {"node": "checkpoint", "done": 1, "total": 4, "values": {"loss": 3.25}}),
    ("note", {"node": "checkpoint", "text": "saving"}),
    ("finished", {"node": "checkpoint", "status": "done", "note": ""}),
    ("finished", {"node": "ct2", "status": "failed", "note": "no room"}),
]


@pytest.fixture
def plan() -> Plan:
    return expand(load_recipe(TINY_RECIPE))


def test_plain_lines_tell_start_progress_and_end(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every_s=0)
    view.begin(plan)
    for kind, value in MESSAGES:
        view.hear(kind, value)
    lines = capsys.readouterr().err.splitlines()
    assert f"{len(plan.variants)} variants" in lines[0]
    assert "start    checkpoint" in lines[1]
    assert "1/4 loss 3.25" in lines[2]
    assert "left" not in lines[2]
    assert lines[3].endswith("checkpoint  saving")
    assert "done     checkpoint" in lines[4]
    assert lines[5].endswith("no room")


def test_time_left_is_told_once_a_step_was_seen_from_its_start(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is heard of began before: its time is not known, and the next ones tell how long one takes."""
    clock = iter((100.0, 130.0, 130.0))
    monkeypatch.setattr("flows.progress_view.time.monotonic", lambda: next(clock))
    state = NodeState(plan.nodes["checkpoint"], "running")
    state.step(2, 10, {})
    assert state.detail() == "2/10"
    state.step(5, 10, {})
    assert state.detail() == "5/10 ~50 s left"


def test_the_live_table_shows_every_status(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    view = LiveView()
    monkeypatch.setattr("rich.live.Live.start", lambda self: None)
    view.begin(plan)
    view.hear("started", {"node": "checkpoint"})
    view.hear("step", {"node": "checkpoint", "done": 2, "total": 4, "values": {"loss": 1.0}})
    view.hear("finished", {"node": "text/train", "status": "cached", "note": ""})
    view.hear("finished", {"node": "ct2", "status": "failed", "note": "no room"})
    screen = io.StringIO()
    Console(file=screen, width=120, height=100).print(view._render())
    text = screen.getvalue()
    assert "2/4 loss 1" in text
    assert "no room" in text
    assert "=" in text
    assert "2/" in text.splitlines()[0]


def test_a_long_plan_is_cut_around_the_running_node(plan: Plan) -> None:
    states = [NodeState(node) for node in plan.nodes.values()]
    states[20].status = "running"
    shown, hidden = _fit(states, 10)
    assert len(shown) == 10
    assert states[20] in shown
    assert hidden == len(states) - 10


def test_a_view_hears_what_other_processes_tell_up_to_the_last_word(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    view = View()
    view.begin(plan)
    with shown(view, tmp_path) as channel:
        channel.tell("started", {"node": "checkpoint"})
        tell = (
            "import sys; from pathlib import Path; from featherweight.system.progress_channel import ProgressChannel;"
            "progress = ProgressChannel(Path(sys.argv[1])).progress('checkpoint');"
            "[progress.step(done, 1000, loss=1 / done) for done in range(1, 1001)]; progress.flush()"
        )
        subprocess.run([sys.executable, "-c", tell, str(channel.path)], check=True)
        assert channel.path and len(channel.path.read_text().splitlines()) < 20
        channel.tell("finished", {"node": "ct2", "status": "failed", "note": "no room"})
    state = view.states["checkpoint"]
    assert (state.done, state.total, state.values) == (1000, 1000, {"loss": 0.001})
    assert view.states["ct2"].note == "no room"
    assert not list((tmp_path / "work").iterdir())


def test_nobody_is_told_where_there_is_no_channel(tmp_path: Path) -> None:
    for channel in (ProgressChannel(), ProgressChannel(tmp_path / "elsewhere" / "progress.jsonl")):
        progress = channel.progress("checkpoint")
        progress.note("starting")
        progress.step(1, 2)
        progress.flush()
    assert not list(tmp_path.iterdir())
