"""The page of a diverging loss."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from featherweight.report.loss_curve import loss_curve, loss_page


def points(svg: str) -> list[tuple[float, float]]:
    """The corners of the curve, in pixels from the upper left."""
    found = re.search(r'<g id="curve">\s*<path d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", found.group(1))] if found else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "corners"),
    [
        ([3.0, 2.0, 2.5], 3),
        ([3.0, 2.0, math.nan], 2),
        ([2.0, 2.0], 2),
        ([1e-3, 5.0, 1e9, math.inf], 3),
        ([-1.0, 3.0], 2),
        ([2.0], 1),
        ([math.nan], 0),
        ([], 0),
    ],
)
def test_it_is_valid_and_every_point_lies_inside(losses: list[float], corners: int) -> None:
    svg = loss_curve(losses)
    ElementTree.fromstring(svg)
    found = points(svg)
    assert len(found) == corners
    assert all(0 <= x <= 760 and 0 <= y <= 360 for x, y in found)
    assert not losses or f"step {len(losses)}: {losses[-1]:.4g}" in svg


@pytest.mark.slow
def test_a_higher_loss_stands_higher_and_a_later_step_further_right() -> None:
    (x1, y1), (x2, y2), (x3, y3) = points(loss_curve([3.0, 2.0, 40.0]))
    assert x1 < x2 < x3
    assert y3 < y1 < y2


def test_a_long_run_is_thinned_but_its_peak_is_kept() -> None:
    losses = [2.0] * 10_000
    losses[7_777] = 3.0
    found = points(loss_curve(losses))
    assert len(found) < 1000
    lowest = max(y for _, y in found)
    assert min(y for _, y in found) < lowest - 200


def test_the_page_escapes_its_title() -> None:
    page = loss_page([1.0], "loss <nan> & more")
    assert "loss &lt;nan&gt; &amp; more" in page
