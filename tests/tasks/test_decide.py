"""decide: what it records of the winner, of those that lost and of those that are absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featherweight.measure.measurement import Comparison, Measurement, Quality, Speed
from featherweight.measure.spec import ConstraintsSpec, DecideSpec
from tasks.decide import FILE, decide, read_decision

pytestmark = pytest.mark.slow


def measured(folder: Path, latency_s: float) -> Path:
    """The folder of an evaluation of a variant that takes `latency_s`, beside a baseline of one second."""
    sides = []
    for seconds in (latency_s, 1.0):
        quality = Quality(tuple(100.0 + window for window in range(10)), (50,) * 10, (200,) * 10)
        speed = Speed(1, 1, 16, 64, (seconds,) * 5, (seconds / 10,) * 5)
        sides.append(Measurement("torch", quality, (speed,), 5000, 1000, 1.0))
    folder.mkdir(parents=True)
    Comparison(*sides).write(folder)
    return folder


def spec(**constraints: float) -> DecideSpec:
    bounds = ConstraintsSpec.model_validate(constraints)
    return DecideSpec(constraints=bounds, objective="speedup@1", variants=("baseline", "fast", "out"))


def test_the_winner_and_those_without_a_measurement(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inputs = {name: measured(tmp_path / "measured" / name, latency_s) for name, latency_s in (("baseline", 1.0), ("out", 0.5))}
    metrics = decide(spec(), inputs=inputs, out=out)
    assert metrics["variants"] == 2
    found = read_decision(out)
    assert found.winner == "out"
    assert found.reasons["baseline"]
    assert json.loads((out / FILE).read_text())["absent"] == ["fast"]


def test_a_baseline_alone_wins_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    decide(spec(), inputs={"baseline": measured(tmp_path / "measured" / "baseline", 1.0)}, out=tmp_path / "out")
    found = read_decision(tmp_path / "out")
    assert (found.winner, found.summary) == (None, "no variant beside the baseline was measured")


def test_where_none_keeps_the_constraints_nobody_wins(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    inputs = {name: measured(tmp_path / "measured" / name, latency_s) for name, latency_s in (("baseline", 1.0), ("fast", 0.5))}
    decide(spec(min_speedup=3.0), inputs=inputs, out=tmp_path / "out")
    assert read_decision(tmp_path / "out").winner is None
