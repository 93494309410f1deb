"""The plans of the two recipes, and where what their nodes make lies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.reading import load_recipe

HERE = Path(__file__).parent
STAGES, ENGINES = HERE / "stages.yaml", HERE / "engines.yaml"
ENDING = ("decide", "register", "promote")


@cache
def plan_of(recipe: Path) -> Plan:
    """The plan of a recipe for this machine; the file does not change."""
    return expand(load_recipe(recipe))


def at(recipe: Path, checkpoint: Path, out: Path) -> Path:
    """A copy of a recipe below `out` whose checkpoint lies at `checkpoint`."""
    out.write_text(recipe.read_text().replace("CHECKPOINT", str(checkpoint)))
    load_recipe(out)
    return out


def folder_of(work: Path, device: str, id: str) -> Path:
    """Where a node's result lies."""
    return work / device / id.replace("/", "~")
