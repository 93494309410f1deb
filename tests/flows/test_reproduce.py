"""Making a version once more: its recipe narrowed to its variant, and what differs named by the first node."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from featherweight.errors import GateError, IntegrityError
from featherweight.recipe.plan import expand
from featherweight.recipe.reading import load_recipe, recipe_text
from featherweight.recipe.recipe import Recipe
from featherweight.registry.lineage import LineageGraph, LineageNode
from featherweight.report.result import NodeRow, OptimizationResult, VariantRow
from flows.reproduce import _compared, recipe_of
from tests.support.paths import TINY_RECIPE

NAME = "two/half/qat4/ort4"


def graph() -> LineageGraph:
    def node(id: str, stage: str) -> LineageNode:
        return LineageNode(id, stage, {}, f"digest of {id}", "", "", {}, {}, {"prefect": "0.1"}, {}, "", "")

    nodes = (node("checkpoint", "train"), node("two", "distill"), node(NAME, "compile"), node(f"{NAME}/evaluate", "evaluate"))
    return LineageGraph(NAME, "d", recipe_text(load_recipe(TINY_RECIPE)), "older", "run", "", {"bits_per_byte": 2.0}, nodes)


def test_the_recipe_is_of_the_variant_alone_and_promotes_nothing() -> None:
    recipe = Recipe.model_validate(recipe_of(graph()))
    assert [variant.name for variant in expand(recipe).variants if variant.name != "baseline"] == [NAME]
    assert recipe.promote.stage == "none"
    assert yaml.safe_load(graph().recipe)["promote"]["stage"] == "production"


@pytest.mark.parametrize(
    ("changed", "said"), [("", ""), ("two", "two differs, the first of 2"), (NAME, "not made, the first of 1")]
)
def test_each_node_is_equal_or_named(tmp_path, changed: str, said: str) -> None:
    made = {one.id: one.digest for one in graph().nodes} | {f"{NAME}/evaluate": "timed anew"}
    if changed == "two":
        made |= {"two": "other", NAME: "other"}
    elif changed:
        del made[changed]
    rows = tuple(NodeRow(id, "stage", id, "done", 0.0, (), digest) for id, digest in made.items())
    variant = VariantRow(NAME, "onnxruntime-genai", "winner", metrics={"bits_per_byte": 2.5})
    found = _compared("tiny/1", graph(), OptimizationResult("t", "size", NAME, (variant,), nodes=rows), tmp_path)
    assert len(found.nodes) == 3
    assert found.otherwise["prefect"].startswith("0.1 → ")
    assert found.otherwise["code"].startswith("older → ")
    assert "bits per byte 2.5, then 2" in found.to_text()
    assert json.loads(json.dumps(found.to_dict()))["equal"] == (not said)
    if said:
        with pytest.raises(IntegrityError, match=said):
            found.raise_if_wrong()
    else:
        found.raise_if_wrong()


@pytest.mark.parametrize("recipe", ["", "name: hand-made", "- a"])
def test_what_no_recipe_made_is_not_made_anew(recipe: str) -> None:
    with pytest.raises(GateError, match="the lineage holds no recipe"):
        recipe_of(replace(graph(), recipe=recipe))
