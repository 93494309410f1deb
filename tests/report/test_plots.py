"""Plots by matplotlib: the same bytes for the same data, nothing fetched, colours that follow light and dark."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from featherweight.report.loss_curve import loss_page
from featherweight.report.sensitivity_page import MatrixBar, sensitivity_page

BARS = [MatrixBar("model.layers.0.q_proj.weight", 0.02, 0.001), MatrixBar("<evil>.weight", 0.01, 0.002)]


@pytest.mark.slow
def test_equal_data_gives_equal_bytes_in_any_thread() -> None:
    with ThreadPoolExecutor(4) as pool:
        pages = set(pool.map(lambda _: sensitivity_page("int4", "int8", BARS, [("1%", "1 of 2")]), range(8)))
    (page,) = pages
    assert loss_page([1.0, 2.0], "a") == loss_page([1.0, 2.0], "a")
    assert not re.search(r"Matplotlib v|20\d\d-", page)


def test_a_page_asks_the_network_for_nothing_and_its_colours_are_its_styles() -> None:
    for page in (sensitivity_page("int4", "int8", BARS, []), loss_page([3.0, 2.0], "a")):
        assert not re.search(r"(src|href)=\"(?!#)|url\((?!#)|@import", page)
        plot = page[page.index("<svg") : page.index("</svg>")]
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", plot)) <= {"#000000"}
        for name in set(re.findall(r"var\((--\w+)\)", page)):
            assert page.count(f"{name}:") == 2, "one colour in light, one in dark"


def test_a_bar_for_every_matrix_on_either_grid() -> None:
    page = sensitivity_page("int4", "int8", BARS, [("1.0%", "1 of 2, 50% of the weights")])
    assert (page.count("fill: var(--first)"), page.count("fill: var(--second)")) == (2, 2)
    assert "model.layers.0.q_proj" in page and "2.00%" in page
    assert "&lt;evil&gt;" in page and "<evil>" not in page
    assert "<td>1 of 2, 50% of the weights</td>" in page
    assert "<svg" in sensitivity_page("int4", "int8", [], [])
