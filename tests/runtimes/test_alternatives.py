"""A refusal names as a way out only what was asked and does not refuse too."""

from __future__ import annotations

import pytest

from featherweight.runtimes.alternatives import ELSEWHERE, advised
from featherweight.runtimes.spec import ServingSpec
from tests.support.serving_models import serving_spec

REFUSED = serving_spec("ctranslate2", compute_type="int8")


@pytest.mark.parametrize(
    ("able", "told"),
    [
        ((), "it does not; no engine here serves it"),
        (("torch",), "it does not; take torch"),
        (("torch", "torch-static"), "it does not; take torch or torch-static"),
        (("torch", "torch-compile", "torch-static", "torchao-int8"), "it does not; take torch-compile, torch or torch-static"),
        (("ctranslate2",), "it does not; no engine here serves it"),
    ],
)
def test_engines_that_serve_it_are_named(able: tuple[str, ...], told: str) -> None:
    assert advised(f"it does not; {ELSEWHERE}", REFUSED, lambda way: way.engine in able) == told


def test_another_way_out_stays() -> None:
    assert advised(f"too long; say max_tokens 8, or {ELSEWHERE}", REFUSED, lambda way: False) == "too long; say max_tokens 8"
    assert advised("too long; say max_tokens 8", REFUSED, lambda way: True) == "too long; say max_tokens 8"


def test_each_is_asked_in_the_same_numbers_first() -> None:
    asked: list[ServingSpec] = []
    advised(ELSEWHERE, REFUSED, lambda way: bool(asked.append(way)))
    found = [way.precision for way in asked if way.engine == "onnxruntime-genai"]
    assert found == ["int8", "float32", "int4", "int2"]
    assert {way.max_tokens for way in asked} == {REFUSED.max_tokens}
