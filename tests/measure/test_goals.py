"""Goals: constraints, objectives, the Pareto front, and that the decision and the promotion gate judge alike."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import GateError
from featherweight.measure import goals
from featherweight.measure.batching import Batching
from featherweight.measure.goals import choose_winner, judge, judged_batch
from featherweight.measure.load import Load
from featherweight.measure.measurement import Comparison, Plain
from featherweight.measure.relaxing import nearest
from featherweight.measure.request import Request
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.speed import Speed
from featherweight.registry.gate import promotion_gate
from featherweight.registry.registry import RegisteredVersion
from featherweight.report.result import OptimizationResult, VariantRow
from tests.support.comparisons import comparison, measurement, speed


def decide(constraints, objective, comparisons):
    return choose_winner(constraints, objective, {name: one.metrics() for name, one in comparisons.items()})


def promoted(metrics, constraints, objective):
    """The gates of a first promotion; GateError where one refuses. The version carries its goals as its tags alone."""
    tags = {"metrics": json.dumps(metrics), "constraints": json.dumps(constraints.model_dump(exclude_none=True))}
    tags = {f"featherweight.{name}": value for name, value in {**tags, "objective": objective, "variant": "v"}.items()}
    return promotion_gate(RegisteredVersion("m", "1", "none", (), "run", "", tags, 0.0), None)


# The choice


def test_the_fastest_that_keeps_the_constraints_wins():
    decision = decide(
        ConstraintsSpec(max_quality_loss=0.02),
        "speedup@1",
        {
            "int8": comparison(latency_s=0.125, nll=100.1),
            "int4": comparison(latency_s=0.07, nll=106.0),
            "float": comparison(latency_s=0.5),
        },
    )
    assert decision.winner == "int8"
    assert "8.00x" in decision.summary
    assert "quality loss +5.74 %" in decision.reasons["int4"] and "allowed +2.00 %" in decision.reasons["int4"]
    assert decision.reasons["float"].startswith("speed 2.00x") and "8.00x" in decision.reasons["float"]
    assert decision.pareto == ("int4", "int8", "float")


def test_a_constraint_is_kept_with_its_confidence_bound_not_with_its_estimate():
    noisy, steady = comparison(latency_s=0.24, spread=0.5), comparison(latency_s=0.24)
    assert noisy.speedup(1).value > 4 > noisy.speedup(1).low
    decision = decide(ConstraintsSpec(min_speedup=4.0), "speedup@1", {"noisy": noisy, "steady": steady})
    assert decision.winner == "steady"
    assert "wanted 4.00x" in decision.reasons["noisy"]


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ({"max_quality_loss": 0.0}, "quality loss"),
        ({"min_speedup": 100}, "speed 2.00x at batch 1, wanted 100.0x"),
        ({"max_size_bytes": 999}, "size 0.000954 MiB, allowed 0.000953 MiB"),
        ({"max_p95_latency_s": 0.4}, "p95 latency 500 ms at batch 1, allowed 400 ms"),
        ({"max_peak_memory_bytes": 4999}, "peak memory"),
        ({"max_p99_latency_s": 0.4}, "p99 latency 500 ms at batch 1, allowed 400 ms"),
        ({"max_inter_token_s": 0.001}, "time between tokens 7.14 ms at batch 1, allowed 1.00 ms"),
        ({"max_ttft_s": 0.04}, "time to first token 50.0 ms at batch 1, allowed 40.0 ms"),
        ({"max_ttft_s": {64: 0.04}}, "ttft_s_prompt_64 was not measured with its confidence interval"),
        ({"max_startup_s": 0.5}, "time to start 1 s, allowed 0.5 s"),
    ],
)
def test_each_constraint_refuses_with_its_numbers(bounds, named):
    decision = decide(ConstraintsSpec(**bounds), "speedup@1", {"only": comparison(latency_s=0.5, nll=101.0)})
    assert decision.winner is None
    assert named in decision.reasons["only"]
    assert decision.pareto == ("only",)


def test_level_within_the_noise_the_better_quality_wins():
    variants = {
        "faster": comparison(latency_s=0.100, nll=101.0, spread=0.05),
        "better": comparison(latency_s=0.102, nll=100.1, spread=0.05),
    }
    decision = decide(ConstraintsSpec(), "speedup@1", variants)
    assert decision.winner == "better"
    assert "level" in decision.reasons["faster"] and "quality" in decision.reasons["faster"]


def test_a_clear_lead_beats_better_quality():
    variants = {"faster": comparison(latency_s=0.05, nll=101.0), "better": comparison(latency_s=0.1, nll=100.1)}
    assert decide(ConstraintsSpec(), "speedup@1", variants).winner == "faster"


def test_the_objective_may_be_size_or_quality_or_another_batch_size():
    small, good = comparison(latency_s=0.4, nll=102.0, size=10), comparison(latency_s=0.5, nll=99.0, size=500)
    fast = Comparison(replace(measurement(), speeds=(speed([1.0] * 5), speed([0.1] * 5, batch_size=8))), measurement())
    variants = {"small": small, "good": good, "fast": fast}
    winners = {o: decide(ConstraintsSpec(), o, variants).winner for o in ("size", "quality", "speedup@8", "speedup@1")}
    assert winners == {"size": "small", "quality": "good", "speedup@8": "fast", "speedup@1": "small"}


def speculating(latency_s: float, gain: float, at_eight: float = 1.0, spread: float = 0.0) -> Comparison:
    """A variant with speculation, so many times faster than without at batch 1 and 8."""
    steps = (-1, -0.5, 0, 0.5, 1)
    plain = speed([latency_s * gain * (1 + spread * step) for step in steps]), speed([latency_s * at_eight] * 5, batch_size=8)
    speeds = speed([latency_s * (1 - spread * step) for step in steps]), speed([latency_s] * 5, batch_size=8)
    return Comparison(
        replace(measurement(latency_s), speeds=speeds),
        measurement(batches=(1, 8)),
        plain=Plain(plain, {1: 2.5}),
    )


def test_speculation_wins_only_where_it_is_surely_no_slower_than_none(tmp_path):
    variants = {
        "ngram": speculating(0.2, 1.3),
        "unsure": speculating(0.1, 1.01, spread=0.2),
        "slower": speculating(0.1, 0.8),
        "slower@8": speculating(0.1, 2.0, at_eight=0.9),
        "plain": comparison(latency_s=0.26),
    }
    variants["ngram"].write(tmp_path)
    assert Comparison.read(tmp_path) == variants["ngram"]
    metrics = variants["ngram"].metrics()
    assert metrics["speculation_speedup_1_low"] == pytest.approx(1.3) and metrics["tokens_per_pass_1"] == 2.5
    decision = decide(ConstraintsSpec(), "speedup@1", variants)
    assert decision.winner == "ngram"
    told = "speed against the same without speculation"
    assert decision.reasons["slower"] == f"{told} 0.80x at batch 1, wanted surely no less than 1.00x"
    assert decision.reasons["slower@8"] == f"{told} 0.90x at batch 8, wanted not surely less than 1.00x"
    assert decision.reasons["unsure"].startswith(f"{told} 1.01x") and "at batch 1" in decision.reasons["unsure"]
    assert decide(ConstraintsSpec(), "speedup@8", {"a": variants["slower@8"], "plain": variants["plain"]}).winner == "plain"


def test_a_variant_that_speculation_slows_is_not_promoted_and_not_what_to_relax_for():
    metrics = speculating(0.1, 0.8).metrics()
    tags = {"featherweight.metrics": json.dumps(metrics), "featherweight.variant": "ngram"}
    version = RegisteredVersion("m", "1", "none", (), "run", "", tags, 0.0)
    with pytest.raises(GateError, match=r"speculation@1: speed against the same without speculation 0.80x"):
        promotion_gate(version, None, ConstraintsSpec())
    assert nearest(ConstraintsSpec(min_speedup=99.0), "speedup@1", {"ngram": metrics}) is None


def long_prompts(ttft_s: float, nll: float = 100.0) -> Comparison:
    """A variant whose first token behind 512 tokens comes after `ttft_s`, beside a baseline that takes a second."""
    sides = [
        replace(measurement(nll=score), lengths=(Speed(1, 2, 512, 16, (2.0,) * 3, (first,) * 3),))
        for first, score in ((ttft_s, nll), (1.0, 100.0))
    ]
    return Comparison(*sides)


def test_a_long_prompts_first_token_may_be_bounded_and_be_the_objective():
    variants = {"quick": long_prompts(0.25, 101.0), "slow": long_prompts(0.5), "baseline": long_prompts(1.0)}
    decision = decide(ConstraintsSpec(), "ttft@512", variants)
    assert decision.winner == "quick"
    assert decision.summary.startswith("first token 4.00x sooner behind 512 tokens")
    decision = decide(ConstraintsSpec(max_ttft_s={512: 0.3}, max_quality_loss=0.005), "ttft@512", variants)
    assert decision.winner is None
    assert decision.reasons["slow"] == "time to first token 500 ms behind 512 tokens, allowed 300 ms"
    assert goals.bound_shown("max_ttft_s.512", 0.3) == "300 ms"
    metrics = variants["quick"].metrics()
    assert [goals.judged_threads(one, metrics) for one in ("ttft@512", "speedup@8")] == [2, 1]
    assert judged_batch("ttft@512", metrics) == 1


def asked(wait_s: float, unanswered: int = 0, nll: float = 100.0) -> Comparison:
    """A variant whose requests, 400 of them at each of two rates, wait so long, at the second twice as long; of them as many as
    divide 400 are never answered, one now and then."""
    waits = [None if unanswered and at % (400 // unanswered) == 0 else wait_s for at in range(400)]
    loads = []
    for rate, longer in ((2.5, 1), (5.0, 2)):
        requests = [Request(0.0, wait and 0.1 * longer, wait and wait * longer) for wait in waits]
        loads.append(Load(rate, 3, 16, (tuple(requests),)))
    sides = (replace(measurement(nll=score), loads=tuple(loads)) for score in (nll, 100.0))
    return Comparison(*sides)


def test_what_requests_wait_may_be_bounded_at_every_rate_or_at_some():
    variants = {"quick": asked(0.5), "slow": asked(1.5), "full": asked(0.5, unanswered=10)}
    decision = decide(ConstraintsSpec(max_p99_request_s=2.0), "size", variants)
    assert decision.winner == "quick"
    assert decision.reasons["slow"] == "p99 latency 3000 ms at every rate of requests, allowed 2000 ms"
    assert decision.reasons["full"].startswith("p99 latency at every rate of requests is not known: too few requests were answered")
    decision = decide(ConstraintsSpec(max_p95_request_s={2.5: 1.0}, max_p99_request_ttft_s={5: 0.05}), "size", variants)
    assert decision.winner is None
    assert "p95 latency 1500 ms at 2.5 requests a second, allowed 1000 ms" in decision.reasons["slow"]
    assert "p99 time to first token 200 ms at 5 requests a second, allowed 50.0 ms" in decision.reasons["quick"]
    assert "p95" not in decision.reasons["full"], "of 400 requests ten are fewer than one in twenty"
    metrics = variants["quick"].metrics()
    assert goals.request_rates(metrics) == ["2.5", "5"]
    assert goals.judged_threads("speedup@1", metrics) == 3, "served as it was asked"
    assert goals.judged_batching(metrics) == Batching(8), "the largest that was timed, where nobody chose"
    chosen = {**metrics, "max_batch_requests": 2.0, "batch_window_s_requests": 0.01}
    assert goals.judged_batching(chosen) == Batching(2, 0.01)
    assert goals.bound_shown("max_p99_request_s.2.5", 0.3) == "300 ms"


def test_nobody_wins_among_none():
    decision = decide(ConstraintsSpec(), "speedup@1", {})
    assert (decision.winner, decision.pareto) == (None, ())


variants = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        comparison,
        latency_s=st.floats(0.05, 2),
        nll=st.floats(90, 120),
        size=st.integers(1, 2000),
        spread=st.sampled_from([0.0, 0.02, 0.3]),
        eight=st.floats(0.3, 3),
    ),
    min_size=1,
)


@pytest.mark.slow
@given(variants, st.sampled_from(["speedup@1", "speedup@8", "size", "quality"]), st.sampled_from([None, 0.0, 0.1]))
@settings(max_examples=40, deadline=None)
def test_a_choice_is_sound(measured, objective, max_loss):
    bounds = ConstraintsSpec(max_quality_loss=max_loss)
    decision = decide(bounds, objective, measured)
    keeping = {name for name, one in measured.items() if max_loss is None or one.quality_change.high <= max_loss}
    assert (decision.winner in keeping) if keeping else decision.winner is None
    assert decision.reasons.keys() == measured.keys() - {decision.winner}
    assert all(decision.reasons.values())
    judged = 8 if objective == "speedup@8" else 1
    for name in decision.pareto:
        mine = measured[name]
        assert not any(
            other.quality_change.value < mine.quality_change.value and other.speedup(judged).value > mine.speedup(judged).value
            for other in measured.values()
        )
    if decision.winner and objective == "size":
        assert measured[decision.winner].variant.size_bytes == min(measured[name].variant.size_bytes for name in keeping)
    if decision.winner and objective.startswith("speedup"):
        batch = int(objective[-1])
        best = max(measured[name].speedup(batch).low for name in keeping)
        assert measured[decision.winner].speedup(batch).value >= best


# One rule for the decision and for the promotion gate

EIGHT_ONLY = comparison(latency_s=0.8, eight=0.5)  # 1.25 times as fast at batch 1, 2.5 times at batch 8
ONE_ONLY = comparison(latency_s=0.4, eight=2.0)  # 2.5 times at batch 1, 1.25 times at batch 8


@pytest.mark.parametrize(
    ("objective", "batch", "wins", "loses"),
    [
        ("speedup@8", 8, EIGHT_ONLY, ONE_ONLY),
        ("speedup@1", 1, ONE_ONLY, EIGHT_ONLY),
        ("size", 1, ONE_ONLY, EIGHT_ONLY),
        ("quality", 1, ONE_ONLY, EIGHT_ONLY),
    ],
)
@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"min_speedup": 2.0}, "speed 1.25x at batch {batch}, wanted 2.00x"),
        ({"max_p95_latency_s": 0.5}, "p95 latency 800 ms at batch {batch}, allowed 500 ms"),
    ],
)
def test_speed_is_judged_at_the_objectives_batch_by_both(objective, batch, wins, loses, bounds, said):
    constraints = ConstraintsSpec(**bounds)
    decision = decide(constraints, objective, {"wins": wins, "loses": loses})
    assert decision.winner == "wins"
    assert decision.reasons["loses"] == said.format(batch=batch)
    assert all(gate.passed for gate in promoted(wins.metrics(), constraints, objective))
    with pytest.raises(GateError) as refused:
        promoted(loses.metrics(), constraints, objective)
    assert str(refused.value).endswith(f"{next(iter(bounds))}: {said.format(batch=batch)}")


constraints = st.builds(
    ConstraintsSpec,
    max_quality_loss=st.sampled_from([None, 0.0, 0.1]),
    min_speedup=st.sampled_from([None, 1.0, 4.0]),
    max_size_bytes=st.sampled_from([None, 1000]),
    max_p95_latency_s=st.sampled_from([None, 0.3, 1.0]),
    max_peak_memory_bytes=st.sampled_from([None, 4999, 5000]),
)


@pytest.mark.slow
@given(variants, st.sampled_from(["speedup@1", "speedup@8", "size", "quality"]), constraints)
@settings(max_examples=60, deadline=None)
def test_what_the_decision_accepts_the_promotion_gate_accepts(measured, objective, bounds):
    decision = decide(bounds, objective, measured)
    for name, one in measured.items():
        broken = {verdict.constraint for verdict in judge(bounds, objective, one.metrics()) if not verdict.kept}
        if not broken:
            assert all(gate.passed for gate in promoted(one.metrics(), bounds, objective))
            continue
        assert name != decision.winner
        with pytest.raises(GateError) as refused:
            promoted(one.metrics(), bounds, objective)
        assert broken == {key for key in ConstraintsSpec.model_fields if f"; {key}: " in str(refused.value)}
        assert all(reason in str(refused.value) for reason in decision.reasons[name].split("; "))


@pytest.mark.slow
@given(variants, st.sampled_from([1, 8]))
@settings(max_examples=40, deadline=None)
def test_the_reports_front_is_the_decisions_and_nobody_on_it_is_beaten(measured, batch):
    rows = tuple(VariantRow(name, "torch", "loser", metrics=one.metrics()) for name, one in measured.items())
    front = decide(ConstraintsSpec(), f"speedup@{batch}", measured).pareto
    assert [row.name for row in OptimizationResult("n", f"speedup@{batch}", None, rows).pareto_front(batch)] == list(front)
    points = {name: (-one.speedup(batch).value, one.quality_change.value) for name, one in measured.items()}
    beaten = {a for a, b in itertools.permutations(points, 2) if all(x > y for x, y in zip(points[a], points[b], strict=True))}
    assert set(front) <= points.keys() - beaten
    assert {points[name][1] for name in front} >= {min(loss for _, loss in points.values())}


# What was not measured


@pytest.mark.parametrize(
    ("constraint", "missing", "said"),
    [
        ("min_speedup", "speedup_1_low", "speedup_1 was not measured with its confidence interval"),
        ("max_quality_loss", "quality_change", "quality_change was not measured with its confidence interval"),
        ("max_p95_latency_s", "p95_latency_s_1", "p95_latency_s_1 was not measured"),
        ("max_size_bytes", "size_bytes", "size_bytes was not measured"),
        ("max_peak_memory_bytes", "peak_memory_bytes", "peak_memory_bytes was not measured"),
    ],
)
def test_what_was_not_measured_is_refused_by_both(constraint, missing, said):
    metrics = {key: value for key, value in comparison().metrics().items() if key != missing}
    bounds = ConstraintsSpec(**{constraint: 10**6})
    for known in (metrics, metrics | {missing: float("nan")}):
        assert choose_winner(bounds, "speedup@1", {"only": known}).reasons["only"] == said
        with pytest.raises(GateError, match=f"{constraint}: {said}"):
            promoted(known, bounds, "speedup@1")


def test_an_objective_that_was_not_measured_has_no_winner():
    decision = decide(ConstraintsSpec(), "speedup@4", {"only": comparison()})
    assert (decision.winner, decision.pareto) == (None, ())
    assert decision.reasons["only"] == "speedup_4 was not measured with its confidence interval"


def test_size_and_quality_judge_speed_at_the_smallest_measured_batch():
    metrics = comparison().metrics()
    assert [judged_batch(objective, metrics) for objective in ("speedup@8", "size", "quality")] == [8, 1, 1]
    only_eight = Comparison(measurement(batches=(8,)), measurement(batches=(8,))).metrics()
    assert judged_batch("size", only_eight) == 8
    assert judged_batch("size", {}) == 1


def test_each_constraint_of_a_recipe_has_its_figure():
    assert goals.CONSTRAINTS.keys() == ConstraintsSpec.model_fields.keys()
    assert goals.bound_shown("max_size_bytes", 50 * 2**20) == "50.0 MiB"
