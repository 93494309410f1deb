"""What a recipe may ask of a distillation, and what the plan brings for it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from featherweight.distillation.spec import DistillSpec
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe


def recipe_of(spec: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "checkpoint": {"train": {}},
            "data": {"source": "x"},
            "promote": {"model": "t"},
            "stages": {"distill": {"small": spec}, "export": {"ct2": {"engine": "ctranslate2"}}},
        }
    )


def test_the_plan_brings_what_a_distillation_reads() -> None:
    nodes = expand(recipe_of({"student": "folder", "sequence_level": {"samples": 4}})).nodes
    assert nodes["small"].inputs["student"] == "small+student" and nodes["small+student"].stage == "load"
    assert nodes["small"].inputs["generated"] == "small+text" and nodes["small+text"].inputs["checkpoint"] == "checkpoint"
    nodes = expand(recipe_of({"layers": 2, "choose": "block_influence"})).nodes
    assert nodes["small"].inputs["calibration"] == "text/calibration"
    nodes = expand(recipe_of({"prune": {"ratio": 0.5}})).nodes
    assert nodes["small+student"].stage == "prune" and nodes["small+student"].spec.finetune is None  # type: ignore[attr-defined]
    assert nodes["small"].inputs["student"] == "small+student" and nodes["small"].inputs["checkpoint"] == "checkpoint"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "exactly one of"),
        ({"layers": 2, "student": "x"}, "exactly one of"),
        ({"prune": {"finetune": {"steps": 3}}}, "distillation is the recovery"),
        ({"layers": [0, 1], "choose": "block_influence"}, "wants a number"),
        ({"layers": {"encoder": [0]}, "choose": "block_influence"}, "wants a number"),
        ({"layers": 2, "teacher_cache": "top_k", "hidden_weight": 1.0}, "keeps no hidden states"),
        ({"layers": 2, "sequence_level": {"beams": 2, "temperature": 1.0}}, "not both"),
        ({"layers": 2, "sequence_level": {"prompt_tokens": 128}}, "nothing to write"),
    ],
)
def test_contradictions_are_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DistillSpec.model_validate(spec)
