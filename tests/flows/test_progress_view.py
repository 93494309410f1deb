"""What a person sees while a plan runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.reading import load_recipe
from flows.progress_view import LiveView, NodeState, PlainView, _fit


@pytest.fixture
def plan() -> Plan:
    return expand(load_recipe(Path(__file__).parents[1] / "support" / "tiny.yaml"))


def test_plain_lines_tell_start_progress_time_left_and_end(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every_s=0)
    view.begin(plan)
    node = plan.nodes["checkpoint"]
    view.started(node)
    progress = view.listener(node)
    progress.step(1, 4, loss=3.25)
    progress.note("saving")
    view.finished("checkpoint", "done")
    view.finished("ct2", "failed", "no room")
    lines = capsys.readouterr().err.splitlines()
    assert "8 variants" in lines[0]
    assert "start    checkpoint" in lines[1]
    assert "1/4 loss 3.25" in lines[2]
    assert "s left" in lines[2]
    assert lines[3].endswith("checkpoint  saving")
    assert "done     checkpoint" in lines[4]
    assert lines[5].endswith("no room")


def test_the_live_table_shows_every_status(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    view = LiveView()
    monkeypatch.setattr("rich.live.Live.start", lambda self: None)
    view.begin(plan)
    view.started(plan.nodes["checkpoint"])
    view.listener(plan.nodes["checkpoint"]).step(2, 4, loss=1.0)
    view.finished("text/train", "cached")
    view.finished("ct2", "failed", "no room")
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
