"""Threads that read source at the same time, while the collector lets them interrupt each other."""

from __future__ import annotations

import ast
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featherweight.system.syntax import syntax_of


@pytest.fixture
def interrupting_collector() -> Iterator[None]:
    def interrupt(phase: str, told: dict[str, int]) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(interrupt)
    gc.set_threshold(100)
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(interrupt)


@pytest.mark.usefixtures("interrupting_collector")
def test_threads_that_read_source_do_not_disturb_each_other() -> None:
    source = Path(ast.__file__).read_text()
    with ThreadPoolExecutor(3) as pool:
        trees = list(pool.map(syntax_of, [source] * 30))
    assert len({len(tree.body) for tree in trees}) == 1
    assert gc.isenabled()
