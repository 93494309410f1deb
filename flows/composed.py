"""No recipe: `optimize` and `plan` of a checkpoint compose one from advice. A recipe goes through as it is."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import RecipeError
from featherweight.recipe.advice.composing import Composed, compose
from featherweight.recipe.advice.expected import Asked
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from flows.advise import Described, advice_on

RECIPES = (".yaml", ".yml")
UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
FILE = "recipe.yaml"


@dataclass(frozen=True)
class Wanted:
    """What is said beside a checkpoint, in a user's words."""

    text: str | None = None
    budget: str = "10m"
    max_loss: str = "1%"


def seconds_of(text: str) -> float:
    """'10m', '90s', '1.5 h' or a number of seconds. Raises RecipeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in UNITS:
        raise RecipeError(f"--budget {text}: give a time, such as 90s, 10m or 1h")
    return float(found[1]) * UNITS[found[2]]


def is_recipe(argument: str) -> bool:
    """Whether it is a recipe, and not a checkpoint: by its name."""
    return Path(argument).suffix in RECIPES


def composed(argument: str, wanted: Wanted, workspace: Path) -> Composed:
    """The recipe for a checkpoint. Raises CheckpointError, RecipeError."""
    advice = advice_on(argument, Described(), Asked(), wanted.max_loss, None, workspace)
    text = wanted.text
    if text and (there := Path(text).expanduser()).exists():
        text = str(there.absolute())
    return compose(advice, seconds_of(wanted.budget), text)


def written(argument: str, wanted: Wanted, workspace: Path, quiet: bool = False) -> Path:
    """The recipe's path; of a checkpoint, one that is written to the workspace, and the command that runs it again is told."""
    if is_recipe(argument):
        return Path(argument)
    made = composed(argument, wanted, workspace)
    path = made.write(workspace / FILE)
    if not quiet:
        _tell(made)
        again = shlex.join(["featherweight", "optimize", str(path), "--workspace", str(workspace)])
        print(f"recipe: {path}; run it again, word for word: {again}", file=sys.stderr)
    return path


def recipe_for(argument: str, overrides: tuple[str, ...], wanted: Wanted, workspace: Path, told: bool = True) -> Recipe:
    """The recipe itself, with its overrides; nothing is left behind."""
    if is_recipe(argument):
        return load_recipe(Path(argument), overrides)
    made = composed(argument, wanted, workspace)
    if told:
        _tell(made)
    with tempfile.TemporaryDirectory() as folder:
        return load_recipe(made.write(Path(folder) / FILE), overrides)


def _tell(made: Composed) -> None:
    """The recipe with its reasons, on standard error: a table or JSON may follow on the other."""
    print(made.text, file=sys.stderr)
