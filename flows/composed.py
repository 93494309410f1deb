"""No recipe: `optimize` and `plan` of a checkpoint compose one from advice. A recipe goes through as it is."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import DataError, RecipeError
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from featherweight.spec import LONGEST_S, seconds_of
from featherweight.system.device import CPU, CUDA
from featherweight.system.machine import describe
from featherweight.system.shipped import shipped
from featherweight.text.sources import STDLIB

if TYPE_CHECKING:
    from featherweight.recipe.advice.composing import Composed
    from featherweight.recipe.advice.expected import Asked
    from flows.advise import Described

RECIPES = (".yaml", ".yml")
FILE = "recipe.yaml"


@dataclass(frozen=True)
class Wanted:
    """What is said beside a checkpoint, in a user's words.

    use: 'one' request at a time, 'users:N' at once, 'batch:N'. machine: that is to serve it, 'this', 'cpu' or GPUs by their name.
    """

    text: str | None = None
    budget: str = "10m"
    max_loss: str = "1%"
    use: str = "one"
    machine: str = "this"


def text_named(text: str | None) -> str | None:
    """A source of text with its whole path, None for Python's own, which is taken where none is named. Raises DataError."""
    if not text or text in ("none", STDLIB):
        return None
    there = Path(text).expanduser()
    if there.exists() or text.startswith("s3://"):
        return str(there.absolute()) if there.exists() else text
    raise DataError(f"--text {text}: there is no such file or folder; give one, or s3://BUCKET/PREFIX")


def use_of(text: str) -> Asked:
    """'one', 'users:16' or 'batch:8' as a workload. Raises RecipeError."""
    from featherweight.recipe.advice.expected import Asked

    found = re.fullmatch(r"one|(users|batch):([1-9]\d{0,4})", text.strip())
    if found is None:
        raise RecipeError(f"--for {text}: give one, users:N or batch:N, such as users:16")
    return Asked(sequences=int(found[2] or 1), concurrent=found[1] == "users")


def machine_named(text: str) -> Described:
    """'this', 'cpu', or GPUs such as 'L4' and '2xH100', which count as those of another machine. Raises RecipeError."""
    from featherweight.recipe.advice.hardware import with_cards
    from flows.advise import Described

    if text in ("this", CPU):
        return Described(device="auto" if text == "this" else CPU)
    with_cards(describe(), text)
    return Described(device=CUDA, cards=text)


def budget_of(text: str) -> float:
    """'10m' as seconds, of which there are some. Raises RecipeError."""
    seconds = seconds_of(text)
    if not 0 < seconds <= LONGEST_S:
        raise RecipeError(f"--budget {text}: give a time such as 90s, 10m or 1h, longer than none")
    return seconds


def is_recipe(argument: str) -> bool:
    """Whether it is a recipe, and not a checkpoint: by its name."""
    return Path(argument).suffix in RECIPES


def recipe_file(argument: str) -> Path:
    """A recipe's path; one that Featherweight brings along goes by its name, such as recipes/demo.yaml, in any folder."""
    path = Path(argument)
    ours = shipped(argument)
    return ours if path.parent == Path("recipes") and not path.exists() and ours.exists() else path


def composed(argument: str, wanted: Wanted, workspace: Path) -> Composed:
    """The recipe for a checkpoint. Raises CheckpointError, DataError, RecipeError."""
    from featherweight.recipe.advice.composing import compose
    from flows.advise import advice_on

    text, budget = text_named(wanted.text), budget_of(wanted.budget)
    advice = advice_on(argument, machine_named(wanted.machine), use_of(wanted.use), wanted.max_loss, None, workspace)
    return compose(advice, budget, text)


def written(argument: str, wanted: Wanted, workspace: Path, quiet: bool = False) -> Path:
    """The recipe's path; of a checkpoint, one that is written to the workspace, and the command that runs it again is told."""
    if is_recipe(argument):
        return recipe_file(argument)
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
        return load_recipe(recipe_file(argument), overrides)
    made = composed(argument, wanted, workspace)
    if told:
        _tell(made)
    with tempfile.TemporaryDirectory() as folder:
        return load_recipe(made.write(Path(folder) / FILE), overrides)


def _tell(made: Composed) -> None:
    """The recipe with its reasons, on standard error: a table or JSON may follow on the other."""
    print(made.text, file=sys.stderr)
