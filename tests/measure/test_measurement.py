"""Statistics of measurements, and the choice of a winner."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import IntegrityError, StageError
from featherweight.measure.batching import Batching, Trial
from featherweight.measure.load import Load, arrivals
from featherweight.measure.measurement import FILE, Comparison, Measurement, Quality
from featherweight.measure.request import Request
from featherweight.measure.speed import Speed, quantile
from featherweight.measure.statistics import (
    bootstrap_difference,
    bootstrap_median,
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_score_difference,
    correlation_time,
    examples_to_show,
    paired_share_difference,
    quantile_estimate,
    share_of,
    trials_to_show,
    values_to_show,
)
from tests.support.comparisons import comparison, measurement, speed

positive = st.floats(0.01, 100.0)
samples = st.lists(positive, min_size=1, max_size=20)


# Bootstrap


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    draw = numpy.random.default_rng(1)
    values = draw.normal(10.0, 2.0, 400)
    estimate = bootstrap_ratio(values.tolist(), [1.0] * 400)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_interval_of_an_unpaired_ratio_is_that_of_the_delta_method():
    draw = numpy.random.default_rng(2)
    a, b = draw.normal(10.0, 1.0, 300), draw.normal(5.0, 1.0, 300)
    estimate = bootstrap_ratio(a.tolist(), b.tolist(), paired=False)
    relative = math.sqrt((a.var(ddof=1) / a.mean() ** 2 + b.var(ddof=1) / b.mean() ** 2) / 300)
    half = 1.96 * relative * a.mean() / b.mean()
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.15)


def test_intervals_cover_as_often_as_they_promise():
    draw = numpy.random.default_rng(3)
    hits = 0
    for trial in range(200):
        ease = draw.gamma(20, 1, 60)
        estimate = bootstrap_ratio((ease * draw.normal(1.05, 0.05, 60)).tolist(), ease.tolist(), seed=trial, resamples=500)
        hits += estimate.low <= 1.05 <= estimate.high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_share_has_wilsons_interval_and_none_of_few_is_not_surely_none():
    from scipy.stats import binomtest

    for hits, trials in ((0, 40), (1, 7), (50, 100), (9, 9)):
        wanted, found = binomtest(hits, trials).proportion_ci(method="wilson"), share_of(hits, trials)
        assert (found.value, found.low, found.high) == pytest.approx((hits / trials, wanted.low, wanted.high))
    for allowed in (0.5, 0.05, 0.013):
        enough = trials_to_show(allowed)
        assert share_of(0, enough).high <= allowed < share_of(0, enough - 1).high


def test_answers_have_changed_where_a_letter_has():
    ours, theirs = replace(measurement(), answers=("a", "b", "")), replace(measurement(), answers=("a", "B", ""))
    metrics = Comparison(ours, theirs).metrics()
    assert [metrics[f"changed_answers{end}"] for end in ("", "_low", "_high")] == pytest.approx([1 / 3, 0.0615, 0.7923], abs=1e-4)
    assert "changed_answers" not in comparison().metrics()
    with pytest.raises(StageError, match="asked different things"):
        Comparison(ours, measurement()).metrics()


def test_the_difference_of_paired_shares_is_agrestis_and_mins_and_has_a_width_where_nothing_differs():
    ours, theirs = [1.0] * 12 + [0.0] * 8, [1.0] * 9 + [0.0] * 3 + [1.0] + [0.0] * 7
    found = paired_share_difference(ours, theirs)  # 3 gained, 1 lost of 20: (3.5 - 1.5) / 22 -+ 1.96 sqrt(5 - 4 / 22) / 22
    half = 1.959964 * math.sqrt(5 - 4 / 22) / 22
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 2 / 22 - half, 2 / 22 + half))
    same = paired_share_difference(ours, ours)
    assert same.value == 0.0 and same.high == -same.low == pytest.approx(1.959964 / 22)


def test_the_loss_of_accuracy_is_that_of_the_worst_benchmark():
    ours = replace(measurement(), hits={"a": (1.0, 1.0, 0.0, 1.0), "b": (0.0, 0.0, 1.0, 0.0)})
    theirs = replace(measurement(), hits={"a": (1.0, 0.0, 0.0, 1.0), "b": (1.0, 1.0, 1.0, 0.0)})
    metrics = Comparison(ours, theirs).metrics()
    assert (metrics["accuracy_a"], metrics["accuracy_change_a"]) == (0.75, 0.25)
    assert metrics["accuracy_change_b"] == -0.5 == -metrics["accuracy_loss"]
    assert metrics["accuracy_loss_high"] == -metrics["accuracy_change_b_low"] > 0.5
    with pytest.raises(StageError, match="different benchmarks"):
        Comparison(ours, measurement()).metrics()


def test_the_difference_of_a_corpus_score_is_drawn_by_text_and_of_a_mean_it_is_the_means():
    draw = numpy.random.default_rng(1)
    ours, theirs = draw.gamma(5, 1, 80), draw.gamma(4, 1, 80)

    def mean(sums):
        return sums[0] / sums[1]

    found = bootstrap_score_difference([(one, 1.0) for one in ours], [(one, 1.0) for one in theirs], mean)
    wanted = bootstrap_difference(list(ours), list(theirs))
    assert found.value == pytest.approx(wanted.value)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.05)
    assert found.low < found.value < found.high


def test_pairing_takes_out_what_both_sides_share():
    draw = numpy.random.default_rng(4)
    ease = draw.gamma(5, 1, 60)
    a, b = (ease * 1.01).tolist(), ease.tolist()
    paired, unpaired = bootstrap_ratio(a, b), bootstrap_ratio(a, b, paired=False)
    assert paired.high - paired.low < 0.01 * (unpaired.high - unpaired.low)
    assert paired.low > 1 > unpaired.low


@settings(deadline=None)
@given(samples)
def test_the_same_samples_have_the_ratio_one(values):
    for estimate in (bootstrap_ratio(values, values, resamples=50), bootstrap_median_ratio(values, values, resamples=50)):
        assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.floats(0.1, 10), st.integers(0, 3))
def test_an_estimate_lies_in_its_interval_scales_with_its_unit_and_repeats(pairs, unit, seed):
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for function in (bootstrap_ratio, bootstrap_median_ratio):
        one = function(a, b, resamples=50, seed=seed)
        scaled = function([value * unit for value in a], b, resamples=50, seed=seed)
        assert one.low <= one.value <= one.high
        assert one == function(a, b, resamples=50, seed=seed)
        assert [scaled.low, scaled.value, scaled.high] == pytest.approx([one.low * unit, one.value * unit, one.high * unit])


def test_one_disturbed_round_does_not_move_the_median_of_ratios():
    calm = bootstrap_median_ratio([2.0, 2.02, 1.98, 2.01, 2.0], [1.0] * 5)
    disturbed = bootstrap_median_ratio([2.0, 2.02, 1.98, 2.01, 20.0], [1.0] * 5)
    assert disturbed.value == pytest.approx(calm.value, rel=0.01)


@pytest.mark.parametrize(("a", "b", "paired"), [([], [1.0], False), ([1.0], [], False), ([1.0, 2.0], [1.0], True)])
def test_samples_that_cannot_be_compared_are_refused(a, b, paired):
    with pytest.raises(StageError, match="cannot compare"):
        bootstrap_ratio(a, b, paired)


# Figures


@settings(deadline=None)
@given(samples, st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    assert quantile(tuple(values), share) == pytest.approx(float(numpy.quantile(values, share)))


def test_a_uniform_model_has_its_vocabulary_as_perplexity():
    nll = 9 * math.log(512)
    quality = Quality((nll, nll), (9, 9), (36, 36))
    assert quality.perplexity == pytest.approx(512)
    assert quality.bits_per_byte == pytest.approx(9 / 4)


def test_figures_of_speed():
    one = speed([1.0, 2.0, 3.0, 4.0], [0.37, 0.37, 0.37, 0.37], batch_size=8, repeats=2)
    assert one.rounds_s == [1.5, 3.5]
    assert one.tokens_per_s == pytest.approx(8 * 64 / 2.5)
    assert one.inter_token_s == pytest.approx((2.5 - 0.37) / 63)
    assert one.latency_s(0.95) == pytest.approx(3.85)
    assert one.noise == pytest.approx(2.0 / 2.5)


def test_a_variant_beside_its_baseline():
    metrics = comparison(latency_s=0.25, nll=110.0).metrics()
    assert metrics["speedup_1"] == metrics["speedup_8"] == 4.0
    assert metrics["quality_change_low"] <= metrics["quality_change"] <= metrics["quality_change_high"]
    assert metrics["quality_change"] == pytest.approx(10 / 104.5)
    assert metrics["bits_per_byte"] == pytest.approx(114.5 / math.log(2) / 200)
    assert metrics["p95_latency_s_1"] == pytest.approx(0.25)
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_baseline_beside_itself_is_once_as_fast_and_as_good():
    metrics = comparison().metrics()
    assert [metrics[f"speedup_1{bound}"] for bound in ("", "_low", "_high")] == [1.0, 1.0, 1.0]
    assert [metrics[f"quality_change{bound}"] for bound in ("", "_low", "_high")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", [0.001, 0.01, 0.1, 0.9])
def test_so_many_examples_show_a_loss_of_accuracy_and_one_less_does_not(loss):
    needed = examples_to_show(loss)
    assert paired_share_difference([1.0] * needed, [1.0] * needed).low >= -loss
    assert needed == 1 or paired_share_difference([1.0] * (needed - 1), [1.0] * (needed - 1)).low < -loss


def test_other_lengths_of_prompts_and_the_energy_have_figures_of_their_own():
    def side(first_s: float) -> Measurement:
        long = Speed(1, 2, 512, 16, (1.0, 1.2, 1.1), (first_s, first_s + 0.02, first_s + 0.01), energy_j=(8.0, 8.0, 16.0))
        return replace(measurement(), lengths=(long,))

    metrics = Comparison(side(0.1), side(0.4)).metrics()
    assert metrics["ttft_s_prompt_512"] == pytest.approx(0.11)
    assert metrics["ttft_s_prompt_512_low"] == pytest.approx(0.1) and metrics["ttft_s_prompt_512_high"] == pytest.approx(0.12)
    assert metrics["ttft_speedup_prompt_512"] == pytest.approx(0.41 / 0.11)
    assert metrics["p50_latency_s_prompt_512"] == pytest.approx(1.1) and metrics["threads_prompt_512"] == 2
    assert metrics["joules_per_token_prompt_512"] == 32 / 48
    assert "joules_per_token_1" not in metrics, "nothing was read there"
    with pytest.raises(StageError, match="timed at different lengths"):
        Comparison(side(0.1), measurement()).metrics()


TRIED = (Trial(Batching(8), 2.0), Trial(Batching(4), 1.0))


def load(waits_s: list[float | None], rate: float = 4.0) -> Load:
    """Two rounds of requests that came a second after each other, and began to be answered after half of what they waited."""
    requests = [
        Request(float(at), None if wait is None else at + wait / 2, None if wait is None else at + wait)
        for at, wait in enumerate(waits_s)
    ]
    middle = len(requests) // 2
    return Load(rate, 2, 16, (tuple(requests[:middle]), tuple(requests[middle:])), Batching(4, 0.01), TRIED)


def test_requests_at_a_rate_have_figures_of_their_own():
    waits = [1.0 + one / 128 for one in range(400)]
    ours = replace(measurement(), loads=(load(waits), load([2.0] * 400, 8.0)))
    theirs = replace(measurement(), loads=(load([9.0] * 400), load([9.0] * 400, 8.0)))
    metrics = Comparison(ours, theirs).metrics()
    assert metrics["p50_latency_s_rate_4"] == waits[199] and metrics["p99_latency_s_rate_4"] == waits[395]
    assert metrics["p95_ttft_s_rate_4"] == pytest.approx(waits[379] / 2)
    assert metrics["p95_latency_s_requests"] == waits[379] and metrics["p50_latency_s_requests"] == waits[199]
    assert metrics["p50_latency_s_rate_8"] == 2.0
    assert metrics["done_rate_4"] == 1.0 and metrics["threads_requests"] == 2
    spans = (199 + waits[199]) + (199 + waits[399])
    assert metrics["tokens_per_s_rate_4"] == pytest.approx(400 * 16 / spans)
    assert metrics["served_per_s_rate_4"] == pytest.approx(400 / spans)
    assert (metrics["max_batch_requests"], metrics["batch_window_s_requests"]) == (4, 0.01)
    assert not any("request" in key or "rate_" in key for key in comparison().metrics())
    with pytest.raises(StageError, match="asked at different rates"):
        Comparison(ours, measurement()).metrics()


def test_an_encoders_requests_have_no_first_token_and_those_of_before_no_way_of_answering_together():
    one = replace(load([1.0] * 400), new_tokens=0)
    metrics = Comparison(replace(measurement(), loads=(one,)), replace(measurement(), loads=(one,))).metrics()
    assert metrics["p99_latency_s_rate_4"] == 1.0 and metrics["served_per_s_rate_4"] == 1.0
    assert not any("ttft_s_rate" in key or "ttft_s_requests" in key or "tokens_per_s_rate" in key for key in metrics)
    tree = json.loads(json.dumps(asdict(one)))
    assert Load.from_json(tree) == one
    before = Load.from_json({key: value for key, value in tree.items() if key not in ("batching", "tried")})
    old = Comparison(replace(measurement(), loads=(before,)), replace(measurement(), loads=(before,))).metrics()
    assert "max_batch_requests" not in old and "threads_requests" in old


def test_who_is_never_answered_has_waited_for_ever_and_no_figure_hides_it():
    one = load([1.0] * 388 + [None] * 12)
    metrics = Comparison(replace(measurement(), loads=(one,)), replace(measurement(), loads=(one,))).metrics()
    assert metrics["done_rate_4"] == 0.97
    assert metrics["p95_latency_s_rate_4"] == 1.0 and "p99_latency_s_rate_4" not in metrics
    assert "p99_ttft_s_requests" not in metrics and all(map(math.isfinite, metrics.values()))
    assert one.rates["tokens_per_s"] == pytest.approx(388 * 16 / (200 + 188))


def test_requests_come_as_poisson_has_it_and_the_same_each_time():
    came = arrivals(5.0, 4000, seed=1)
    gaps = numpy.diff((0.0, *came))
    assert came == arrivals(5.0, 4000, seed=1) != arrivals(5.0, 4000, seed=2)
    assert (gaps > 0).all() and gaps.mean() == pytest.approx(1 / 5, rel=0.05) and gaps.std() == pytest.approx(1 / 5, rel=0.05)
    counts = numpy.histogram(came, bins=numpy.arange(0, int(came[-1])))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15), "of a Poisson process the counts' variance is their mean"


@pytest.mark.parametrize(("share", "most"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_so_many_values_show_a_quantile_and_one_less_does_not(share, most):
    assert values_to_show(share) == most
    assert quantile_estimate([[1.0] * most], share).high == 1.0
    assert quantile_estimate([[1.0] * (most - 1)], share).high == math.inf


def test_the_interval_of_a_quantile_is_the_order_statistics_and_covers_as_often_as_it_promises():
    draw, hits = numpy.random.default_rng(6), 0
    found = quantile_estimate([[float(value) for value in range(1, 101)]], 0.5)
    assert found.value == 50.0 and (found.low, found.high) == (-math.inf, math.inf), "a hundred in a row say as much as one"
    mixed = quantile_estimate([[float(value)] for value in range(1, 101)], 0.5)
    assert (mixed.value, mixed.low, mixed.high) == (50.0, 40.0, 61.0), "the ranks of the tables, for 100 values"
    for _ in range(300):
        one = quantile_estimate([draw.exponential(1.0, 200).tolist()], 0.95)
        hits += one.low <= -math.log(0.05) <= one.high
    assert hits / 300 >= 0.93
    with pytest.raises(StageError, match="a quantile of nothing"):
        quantile_estimate([], 0.5)


def queue(draw: numpy.random.Generator, requests: int, busy: float) -> list[float]:
    """What each waits in one line whose server is busy that share of the time (Lindley 1952); each takes a second or so."""
    waits, wait = [], 0.0
    for gap, took in zip(draw.exponential(1 / busy, requests), draw.uniform(0.8, 1.2, requests), strict=True):
        wait = max(0.0, wait - gap) + took
        waits.append(wait)
    return waits


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_what_waits_together_has_an_interval_as_wide_as_it_is_unsure(share):
    """The plain order statistics hold the true quantile in 24 to 44 of 100 runs of this queue."""
    draw = numpy.random.default_rng(3)
    truth = numpy.quantile([wait for _ in range(1000) for wait in queue(draw, 240, 0.8)], share)
    found = [quantile_estimate([queue(draw, 240, 0.8) for _ in range(4)], share) for _ in range(60)]
    assert sum(one.low <= truth <= one.high for one in found) / len(found) >= 0.88


def test_of_a_process_that_remembers_as_many_count_as_its_formula_says():
    """AR(1): 1 + 2 * the sum of a ** k is (1 + a) / (1 - a)."""
    draw, runs = numpy.random.default_rng(4), []
    for _ in range(4):
        run = [0.0]
        for noise in draw.normal(size=5000):
            run.append(0.8 * run[-1] + noise)
        runs.append(run)
    assert correlation_time(runs) == pytest.approx(9.0, rel=0.15)
    assert 1.0 <= correlation_time([draw.normal(size=5000)]) < 1.3
    assert correlation_time([[1.0] * 9, [1.0]]) == 1.0


def test_requests_that_are_given_up_together_say_little_of_the_share():
    apart = load(([1.0] * 9 + [None]) * 40)
    together = load([1.0] * 180 + [None] * 20 + [1.0] * 180 + [None] * 20)
    assert apart.done.value == pytest.approx(0.9) == together.done.value
    assert together.done.high - together.done.low > 2 * (apart.done.high - apart.done.low)


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(positive, min_size=4, max_size=4), min_size=1, max_size=9))
def test_what_ends_with_its_first_token_takes_no_longer_to_it_than_in_all(repeats, rounds):
    """An encoder's figures, however many generations a round holds."""
    times = [value for one in rounds for value in one[:repeats]]
    figures = Comparison(one := replace(measurement(batches=(1,)), speeds=(speed(times, times, repeats=repeats),)), one).metrics()
    assert figures["ttft_s_1"] == pytest.approx(figures["p50_latency_s_1"])
    assert figures["ttft_s_1_low"] <= figures["ttft_s_1"] <= figures["ttft_s_1_high"]


def test_the_interval_of_a_median_covers_as_often_as_it_promises_where_a_round_disturbs_all_that_it_holds():
    draw = numpy.random.default_rng(5)
    hits = 0
    for trial in range(200):
        rounds = draw.normal(10.0, 1.0, (31, 1)) + draw.normal(0.0, 0.1, (31, 5))
        estimate = bootstrap_median(rounds.tolist(), seed=trial, resamples=500)
        hits += estimate.low <= 10.0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.99


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 10), st.floats(1, 1e3), st.integers(1, 10**12))
def test_a_measurement_survives_json(tmp_path_factory, latency_s, nll, size):
    folder = tmp_path_factory.mktemp("measurement")
    variant = measurement(latency_s, nll, size)
    variant = replace(variant, speeds=(replace(variant.speeds[0], probe={1: (0.5,), 2: (0.25, 0.26)}, warmup_s=2.0),))
    variant = replace(variant, lengths=(replace(variant.speeds[0], prompt_tokens=512, energy_j=(1.0, 2.0)),))
    variant = replace(variant, loads=(load([latency_s, None, 1.0, 2.0]),))
    written = Comparison(variant, replace(measurement(batches=(1,)), lengths=variant.lengths, loads=variant.loads), "fingerprint")
    written.write(folder)
    assert Comparison.read(folder) == written


@pytest.mark.parametrize("content", [None, "{", "{}", '{"variant": 1, "baseline": 2}'])
def test_what_is_no_measurement_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(IntegrityError, match=r"measurement\.json"):
        Comparison.read(tmp_path)


def test_other_windows_and_unmeasured_batch_sizes_are_refused():
    variant = measurement()
    other = replace(variant, quality=replace(variant.quality, bytes=(201,) * 10))
    with pytest.raises(StageError, match="different windows"):
        _ = Comparison(variant, other).quality_change
    with pytest.raises(StageError, match="batch size 4 was not measured; measured: 1, 8"):
        comparison().speedup(4)
