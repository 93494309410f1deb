"""Bars of libraries are hidden for a while, and are drawn again afterwards."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as auto

from featherweight.system.bars import hidden_bars


@pytest.mark.parametrize("bar", [tqdm, auto])
def test_bars_are_hidden_within_and_drawn_again_behind(bar: type[tqdm[int]]) -> None:
    drawn = {"within": io.StringIO(), "behind": io.StringIO()}
    with pytest.raises(KeyError), hidden_bars():
        assert list(bar(range(3), file=drawn["within"])) == [0, 1, 2]
        raise KeyError
    assert list(bar(range(3), file=drawn["behind"])) == [0, 1, 2]
    assert drawn["within"].getvalue() == "" and "3/3" in drawn["behind"].getvalue()
