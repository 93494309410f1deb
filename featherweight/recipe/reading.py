"""Reading a recipe: YAML, the overrides of a command line, and one line for what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from featherweight.errors import RecipeError, nearest, one_line
from featherweight.masking import masked, masked_tree
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.yaml_text import read_yaml
from featherweight.spec import NamedSpec, Spec


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are 'a.b=c' with c in YAML. Raises RecipeError with one line."""
    try:
        tree = read_yaml(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    for override in overrides:
        _set(tree, override)
    _refuse_passwords(tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path.name}: {_explain(error, tree)}") from error


def recipe_text(recipe: Recipe) -> str:
    """The recipe with every default spelt out, as YAML fit to be shown."""
    return yaml.safe_dump(masked_tree(recipe.model_dump(mode="json")), sort_keys=False)


def _refuse_passwords(tree: Any, where: str = "") -> None:
    """A recipe is copied, logged and shown: what it must not hold is refused, so that it is nowhere."""
    if isinstance(tree, str) and masked(tree) != tree:
        raise RecipeError(f"{where}: {tree} holds a password or a key; give credentials by the environment (AWS_..., HF_TOKEN)")
    for key, one in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        _refuse_passwords(one, f"{where}{'.' if where else ''}{key}")


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one 'a.b=c'."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set wants KEY.KEY=VALUE, got '{override}'")
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: '{key}' holds a value, not keys")
    try:
        tree[last] = read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {one_line(error)}") from error


def _explain(error: ValidationError, tree: Any) -> str:
    """The first problem of a validation error, in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] != "extra_forbidden":
        return f"{where}{': ' if where else ''}{_said(first, tree)}{more}"
    known = _known_keys(first["loc"][:-1], tree)
    return f"unknown key '{where}'; {nearest(str(first['loc'][-1]), sorted(known))}{more}"


def _said(one: Any, tree: Any) -> str:
    """What an error says, in the words of YAML where pydantic has those of Python."""
    if one["type"] in ("tuple_type", "list_type"):
        return f"must be a list, such as [a, b], not {one['input']!r}"
    if one["type"] in ("dict_type", "model_type", "model_attributes_type"):
        known = "" if one["type"] == "dict_type" else ", ".join(_known_keys(one["loc"], tree))
        return f"must have keys of its own{f' ({known})' if known else ''}, not be {one['input']!r}"
    return str(one["msg"].removeprefix("Value error, "))


def _known_keys(location: tuple[int | str, ...], tree: Any) -> list[str]:
    """Field names of the model that stands at `location` in a recipe, of the class that reads what the `tree` says there."""
    model: Any = Recipe
    for part in location:
        if isinstance(model, type) and issubclass(model, Spec) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        model, tree = _spec_inside(model), tree[part]
        if isinstance(model, type) and issubclass(model, NamedSpec):
            model = (model.kind(tree.get(model.named_by)) if isinstance(tree, dict) else None) or model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Spec) else []


def _spec_inside(annotation: Any) -> Any:
    """The Spec class that an annotation such as `dict[Name, X]`, `X | None` or `tuple[X, ...]` holds."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_inside(argument)
        if found is not None:
            return found
    return None
