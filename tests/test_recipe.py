"""Recipes are strict, and say what is wrong in one line."""

from pathlib import Path

import pytest
import yaml

from featherweight.errors import RecipeError
from featherweight.recipe import Recipe, load_recipe

MINIMAL = {
    "name": "x",
    "checkpoint": {"source": "folder"},
    "data": {"source": "text.txt"},
    "promote": {"model": "x"},
}


@pytest.fixture
def write(tmp_path: Path):
    def _write(**changes: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return path

    return _write


def test_a_minimal_recipe_is_valid_and_frozen(write) -> None:
    recipe = load_recipe(write())
    assert recipe.workload.batch_sizes == (1, 8)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constrains": {}}, "unknown key 'constrains'; did you mean 'constraints'"),
        ({"stages": {"quantise": {}}}, "did you mean 'quantize'"),
        ({"stages": {"quantize": {"a": {"metod": "rtn"}}}}, "unknown key 'stages.quantize.a.metod'; did you mean 'method'"),
        ({"stages": {"prune": {"p": {"finetune": {"step": 3}}}}}, "did you mean 'steps'"),
        ({"checkpoint": {}}, "exactly one of 'source' and 'train'"),
        ({"objective": "fast"}, "objective: "),
        ({"stages": {"quantize": {"a": {}}, "prune": {"a": {}}}}, "recipe.yaml: the name 'a' stands twice"),
        ({"stages": {"quantize": {"none": {}}}}, "'none' is reserved"),
        ({"stages": {"quantize": {"A B": {}}}}, "stages.quantize.A B"),
    ],
)
def test_mistakes_are_named(write, changes: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00\xff"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_overrides_reach_any_key(write) -> None:
    path = write()
    recipe = load_recipe(path, ("workload.batch_sizes=[2]", "constraints.max_quality_loss=0.02", "seed=7"))
    assert (recipe.workload.batch_sizes, recipe.constraints.max_quality_loss, recipe.seed) == ((2,), 0.02, 7)
    for wrong in ("seed", "=3", "seed.x=1", "seed={"):
        with pytest.raises(RecipeError):
            load_recipe(path, (wrong,))
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        load_recipe(path, ("workload.round=3",))


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
