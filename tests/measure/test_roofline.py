"""The roofline's formula, in plain arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from featherweight.measure.measurement import Comparison
from featherweight.measure.roofline import BytesRead, Roofline, cache_position_bytes
from tests.support.comparisons import measurement, speed


def test_a_decoder_reads_its_weights_and_a_growing_cache_for_each_token():
    position = cache_position_bytes(layers=2, kv_heads=2, head_dim=8, width=4)
    assert position == 2 * 2 * 2 * 8 * 4
    lengths = [16 + step for step in range(4)]
    wanted = 1000 + position * sum(lengths) / 4
    assert BytesRead(1000, position=position).per_token(prompt_tokens=16, new_tokens=4) == wanted


def test_an_encoder_is_read_once_and_its_output_attended_by_every_token():
    read = BytesRead(step=1000, once=600, position=10, source_position=10)
    wanted = (3 * 1000 + 600 + 10 * (1 + 2 + 3) + 3 * 10 * 16) / 3
    assert read.per_token(prompt_tokens=16, new_tokens=3) == wanted


def test_the_share_is_achieved_over_measured_bandwidth():
    assert Roofline(bytes_per_token=2e6, bandwidth_bytes_s=1e10).share(tokens_per_s=1000) == pytest.approx(0.2)


def test_a_measurement_keeps_it_and_tells_it_at_batch_1(tmp_path):
    variant = replace(measurement(latency_s=0.5), roofline=Roofline(1e6, 1e9))
    Comparison(variant, measurement()).write(tmp_path)
    read = Comparison.read(tmp_path)
    assert read.variant == variant
    assert read.metrics()["roofline_1"] == pytest.approx(64 / 0.5 * 1e6 / 1e9)
    assert (read.metrics()["bytes_per_token"], read.metrics()["bandwidth_bytes_s"]) == (1e6, 1e9)
    eight = replace(variant, speeds=(speed([0.5] * 5, batch_size=8),))
    assert "roofline_1" not in Comparison(eight, replace(measurement(), speeds=eight.speeds)).metrics()


def test_measurements_of_before_have_none(tmp_path):
    Comparison(measurement(), measurement()).write(tmp_path)
    path = tmp_path / "measurement.json"
    tree = json.loads(path.read_text())
    for side in ("variant", "baseline"):
        del tree[side]["roofline"]
    path.write_text(json.dumps(tree))
    assert Comparison.read(tmp_path).variant.roofline is None
