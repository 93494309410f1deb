"""Errors: what tells a Ctrl-C from a failure."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, model_serializer

from featherweight.errors import StageError, was_interrupted


class Interrupted(BaseModel):
    """What is written when Ctrl-C comes."""

    @model_serializer(mode="wrap")
    def _write(self, handler: Any) -> Any:
        raise KeyboardInterrupt


def test_a_ctrl_c_is_one_whoever_wraps_it() -> None:
    with pytest.raises(Exception, match="KeyboardInterrupt") as caught:
        Interrupted().model_dump_json()
    assert not isinstance(caught.value, KeyboardInterrupt)
    assert was_interrupted(caught.value)
    assert was_interrupted(KeyboardInterrupt())
    failed = StageError("some")
    failed.__cause__ = ValueError("other")
    assert not was_interrupted(failed)
