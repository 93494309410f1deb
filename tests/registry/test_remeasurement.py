"""What has drifted since a version was registered: each kind by itself, and nothing where only the noise moved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from featherweight.errors import GateError
from featherweight.measure.goals import CONSTRAINTS
from featherweight.measure.load import Load
from featherweight.measure.measurement import Comparison, Quality
from featherweight.measure.request import Request
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.speed import Speed
from featherweight.registry.remeasurement import ANYWHERE, Drift, Remeasurement, Then
from tests.support.comparisons import comparison, measurement

NOISE = [0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1, 0.4, -0.3, 0.0]


def scored(then: Comparison, variant: float = 1.0, both: float = 1.0) -> Comparison:
    """The windows of `then` once more, `variant` times as hard for the variant, `both` times for both, with some noise."""

    def again(quality: Quality, times: float) -> Quality:
        return replace(quality, nll=tuple(nll * times + noise / 10 for nll, noise in zip(quality.nll, NOISE, strict=True)))

    return replace(
        then,
        variant=replace(then.variant, quality=again(then.variant.quality, variant * both)),
        baseline=replace(then.baseline, quality=again(then.baseline.quality, both)),
    )


def registered(nll: float = 101.0, latency_s: float = 0.5) -> Comparison:
    """A variant that is a little worse than its checkpoint, each window by another share, and twice as fast."""
    made = comparison(nll=nll, latency_s=latency_s, spread=0.02)
    rough = tuple(value + noise for value, noise in zip(made.variant.quality.nll, NOISE, strict=True))
    return replace(made, variant=replace(made.variant, quality=replace(made.variant.quality, nll=rough)), machine="here")


def drifted(now: Comparison, fresh: bool = False, then: Comparison | None = None, **bounds: float) -> dict[str, str]:
    found = Then(then or registered(), ConstraintsSpec(**bounds), "speedup@1", fresh).drifts(now)
    return {one.what: one.reason for one in found}


def test_the_same_again_has_not_drifted() -> None:
    assert drifted(registered(), max_quality_loss=0.05, min_speedup=1.5) == {}
    assert drifted(scored(registered()), fresh=True) == {}


def test_a_worse_model_on_the_same_text_has() -> None:
    told = drifted(scored(registered(), variant=1.03))
    assert told.keys() == {"quality"}
    assert "quality loss +3.99 %" in told["quality"]


def test_an_engine_that_moves_both_sides_has() -> None:
    """Beside the checkpoint nothing changed; each window of the registered text did."""
    told = drifted(scored(registered(), both=1.03))
    assert told.keys() == {"quality"}
    assert "bits per byte of the same windows +3.0" in told["quality"]


def test_harder_text_is_told_from_a_worse_model() -> None:
    now = scored(registered(), both=1.5)
    found = Then(registered(), ConstraintsSpec(), "speedup@1", fresh=True).drifts(now)
    assert [(one.what, one.mendable) for one in found] == [("text", False)]
    assert drifted(scored(registered(), both=0.7), fresh=True) == {}


def test_a_slower_engine_has_on_the_same_machine_alone() -> None:
    slow = replace(registered(), variant=replace(registered(latency_s=0.8).variant, quality=registered().variant.quality))
    assert drifted(slow).keys() == {"speed"}
    assert drifted(slow, min_speedup=1.5).keys() == {"speed", "min_speedup"}
    assert drifted(replace(slow, machine="elsewhere"), min_speedup=1.5) == {}


def test_a_later_first_token_has_on_the_same_machine_alone() -> None:
    """By the objective, and by bounds of one length of prompts and of others, of the same machine too."""

    def timed(first_s: float, machine: str = "here") -> Comparison:
        theirs = replace(measurement(), lengths=(Speed(1, 1, 512, 16, (2.0,) * 3, (1.0,) * 3),))
        ours = replace(registered().variant, lengths=(Speed(1, 1, 512, 16, (2.0,) * 3, (first_s,) * 3),))
        return replace(registered(), baseline=theirs, variant=ours, machine=machine)

    bounds = ConstraintsSpec(max_ttft_s={512: 0.5}, max_p99_latency_s=0.1, max_startup_s=0.1)
    then = Then(timed(0.2), bounds, "ttft@512", fresh=False)
    found = {one.what: one.reason for one in then.drifts(timed(0.8))}
    assert found.keys() == {"speed", "max_ttft_s.512", "max_p99_latency_s", "max_startup_s"}
    assert found["speed"].startswith("first token 1.25x") and "5.00x" in found["speed"]
    assert then.drifts(timed(0.8, "elsewhere")) == ()


def test_what_another_machine_may_break_is_decided_for_each_constraint() -> None:
    units = {name: figure(1).show(1.0) for name, figure in CONSTRAINTS.items()}
    times = {name for name, shown in units.items() if shown.endswith((" s", " ms", "x")) or name == "max_peak_memory_bytes"}
    assert units.keys() - times == ANYWHERE


def test_requests_that_nobody_answers_any_more_have() -> None:
    def asked(answered: bool) -> Comparison:
        times = [(at + 0.125, at + 0.25) if answered else (None, None) for at in range(400)]
        waited = tuple(Request(float(at), *both) for at, both in enumerate(times))
        loads = (Load(1.0, 1, 8, (waited,)),)
        sides = {side: replace(getattr(registered(), side), loads=loads) for side in ("variant", "baseline")}
        return replace(registered(), **sides)

    bounds = ConstraintsSpec(max_p99_request_s=1.0)
    (drift,) = Then(asked(True), bounds, "speedup@1", fresh=False).drifts(asked(False))
    assert drift.what == "max_p99_request_s" and "too few requests were answered" in drift.reason
    assert Then(asked(True), bounds, "speedup@1", fresh=False).drifts(asked(True)) == ()
    assert Then(asked(False), bounds, "speedup@1", fresh=False).drifts(asked(False)) == (), "it was so when it was registered"


def test_speed_within_the_spread_of_the_rounds_has_not() -> None:
    wide = Comparison(measurement(0.5, spread=0.2), measurement(1.0, spread=0.2), "here")
    later = replace(wide, variant=measurement(0.56, spread=0.2))
    assert drifted(later, then=wide) == {}


def test_a_constraint_counts_once_even_the_good_bound_breaks_it() -> None:
    assert drifted(registered(), max_quality_loss=0.0).keys() == {"max_quality_loss"}
    assert drifted(registered(), max_quality_loss=registered().quality_change.value) == {}


def told(*drifts: Drift, **changes: object) -> Remeasurement:
    metrics = registered().metrics()
    known = {"otherwise": {}, "same_machine": True, "drifts": drifts}
    return Remeasurement("stories", "3", "", metrics, metrics, **{**known, **changes})  # type: ignore[arg-type]


def test_what_drifted_is_refused_by_its_name_until_another_is_champion() -> None:
    slower = Drift("speed", "1.2x, 2.0x when registered")
    with pytest.raises(GateError, match=r"version 3 of 'stories' has drifted: speed: 1.2x"):
        told(slower).raise_if_drifted()
    told(slower, rebuilt="registered as stories version 4, in production", replaced=True).raise_if_drifted()
    told().raise_if_drifted()


def test_a_rebuild_is_spoken_of_where_it_may_win() -> None:
    assert told(Drift("speed", "")).rebuild_may_win
    assert told(otherwise={"onnxruntime-genai": "0.18 → 0.19"}).rebuild_may_win
    assert not told(Drift("text", "", mendable=False)).rebuild_may_win
    assert "onnxruntime-genai: 0.18 → 0.19" in told(otherwise={"onnxruntime-genai": "0.18 → 0.19"}).to_text()
    assert told().to_text().splitlines()[-1] == "nothing has drifted"
    assert json.loads(json.dumps(told().to_dict()))["drifted"] is False


def test_speeds_that_were_measured_beside_other_programs_are_told_as_such() -> None:
    busy = replace(told(), now=registered().metrics() | {"others_cpu_share": 0.5})
    assert any(line.startswith("now: other programs took over 10%") for line in busy.to_text().splitlines())
    assert "other programs" not in told().to_text()
