"""Specs: what they refuse, and which class reads the keys of a name."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import SerializeAsAny, ValidationError

from featherweight.spec import NamedSpec, Spec


class Served(NamedSpec):
    named_by = "engine"
    engine: str

    @classmethod
    def kind(cls, name: str | None) -> Any:
        return {"a": A, "b": B}.get(name or "a")

    @classmethod
    def kinds(cls) -> Any:
        return (A, B)


class A(Served):
    engine: Literal["a"] = "a"
    x: int = 1


class B(Served):
    engine: Literal["b"]
    y: int = 1


class Stages(Spec):
    export: dict[str, SerializeAsAny[Served]]


@pytest.mark.parametrize("tree", [{"engine": "a", "x": 3}, {"engine": "b"}, {"x": 2}])
def test_the_class_of_the_name_reads_the_keys_and_a_dump_is_valid_again(tree: dict[str, Any]) -> None:
    stages = Stages.model_validate({"export": {"k": tree}})
    kind = B if tree.get("engine") == "b" else A
    assert type(stages.export["k"]) is kind and stages.export["k"] == kind(**tree)
    assert stages.model_dump()["export"]["k"].items() >= tree.items()
    assert Stages.model_validate(stages.model_dump()) == stages
    assert type(Served.model_validate(tree)) is kind


@pytest.mark.parametrize(
    ("tree", "where", "message"),
    [
        ({"engine": "a", "x": "q"}, ("x",), "valid integer"),
        ({"engine": "a", "y": 2}, (), "y plays no role with engine a; leave it out"),
        ({"engine": "a", "z": 2}, ("z",), "Extra inputs"),
        ({"engine": ["a"]}, ("engine",), "valid string"),
    ],
)
def test_errors_say_where_they_are(tree: dict[str, Any], where: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Stages.model_validate({"export": {"k": tree}})
    error = caught.value.errors()[0]
    assert error["loc"] == ("export", "k", *where) and message in error["msg"]
