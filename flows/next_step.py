"""`featherweight` alone: how this folder stands, and what to do next. It looks at files, and imports next to nothing.

MLflow's tables are read where they lie, since importing MLflow takes seconds; what a server holds is not asked for.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import one_line
from featherweight.masking import masked
from featherweight.system.processes import has_ended

RUNS = """SELECT r.run_uuid, r.status, r.start_time FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid
WHERE t.key = 'featherweight.kind' AND t.value = 'optimization' AND r.lifecycle_stage = 'active'
ORDER BY r.start_time DESC LIMIT 1"""
STAGES = """SELECT s.name, s.version, s.value, r.value FROM model_version_tags s
LEFT JOIN model_version_tags r ON r.name = s.name AND r.version = s.version AND r.key = 'featherweight.recipe'
WHERE s.key = 'featherweight.stage' ORDER BY s.name, s.version DESC"""


@dataclass(frozen=True)
class Step:
    """A command that would be next, and what it does."""

    command: str
    does: str


@dataclass(frozen=True)
class Version:
    """A registered version: its stage, and whether its recipe wants a person to approve it."""

    name: str
    number: int
    stage: str
    approval: bool

    @property
    def reference(self) -> str:
        """As commands take it."""
        return f"{self.name}/{self.number}"


@dataclass(frozen=True)
class Run:
    """The latest optimization. status: MLflow's, or 'KILLED' where its process is gone. winner: 'none' for none."""

    id: str
    status: str
    winner: str
    recipe: str
    error: str


@dataclass(frozen=True)
class Standing:
    """What a folder holds. remote: the server that holds runs and versions instead. fault: why they cannot be read."""

    recipes: dict[str, str]
    run: Run | None = None
    versions: tuple[Version, ...] = ()
    remote: str = ""
    fault: str = ""
    report: str = ""

    @property
    def facts(self) -> list[str]:
        """In words, a line each."""
        run, found = self.run, [f"recipes: {', '.join(self.recipes)}" if self.recipes else "no recipe in this folder"]
        if self.remote or self.fault:
            return [*found, f"runs and versions are at {self.remote}" if self.remote else self.fault]
        told = f"the latest run, of {run.recipe}, {_ended(run)}" if run else "nothing was run yet"
        return [*found, told, *(f"{one.reference} is in {one.stage}" for one in self.versions if one.stage != "none")]

    def steps(self) -> Iterator[Step]:
        """What is next, the most urgent first."""
        yield from self._to_decide()
        if self.remote:
            yield Step("featherweight variants", "the latest result there")
        run = self.run
        if run and run.status == "RUNNING":
            yield Step("featherweight ui", "look at it, and at all others, in the browser")
        elif run and run.status in ("FAILED", "KILLED"):
            yield Step(f"featherweight optimize {self._recipe(run)}", "again: what was finished is not done anew")
        elif run:
            yield Step(
                "featherweight variants", "the table of the latest run" + (f"; its page: {self.report}" if self.report else "")
            )
        elif self.recipes:
            first = next(iter(self.recipes))
            yield Step(f"featherweight plan {first}", "what it would make, and how long it would take")
            yield Step(f"featherweight optimize {first}", "make it, measure it, register the winner")
        if not self.recipes and not run:
            yield Step("featherweight init", "six questions, and a recipe")
            yield Step("featherweight demo", "or the whole of it on a small model that is trained here, in about five minutes")
        yield from (Step(f"featherweight serve {one.name}", "serve the champion") for one in self._in("production"))

    def _to_decide(self) -> Iterator[Step]:
        for one in self._in("staging"):
            if one.approval:
                yield Step(f'featherweight approve {one.reference} --why "..."', "it waits for a person; --refuse refuses it")
            else:
                yield Step(f'featherweight promote {one.reference} --why "..."', "from staging to production, through its gate")

    def _in(self, stage: str) -> list[Version]:
        return [one for one in self.versions if one.stage == stage]

    def _recipe(self, run: Run) -> str:
        return next((path for path, name in self.recipes.items() if name == run.recipe), "RECIPE")


def look(folder: Path, workspace: Path) -> Standing:
    """How `folder` stands, with the workspace that its commands take."""
    recipes = dict(_recipes(folder))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri and not uri.startswith("sqlite:"):
        return Standing(recipes, remote=masked(uri))
    database = Path("/" + uri.partition(":///")[2].lstrip("/")) if uri else workspace / "mlflow.db"
    if not database.is_file():
        return Standing(recipes)
    report = "report.html" if (folder / "report.html").is_file() else ""
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=1)) as tables:
            return Standing(recipes, _run(tables), tuple(_versions(tables)), report=report)
    except sqlite3.Error as error:
        return Standing(recipes, fault=f"{database} cannot be read: {one_line(error)}")


def _recipes(folder: Path) -> Iterator[tuple[str, str]]:
    """Files of the folder, or else of its `recipes`, that have a recipe's keys, with their names."""
    for place in (folder, folder / "recipes"):
        found = [(path, _name_in(path)) for path in sorted([*place.glob("*.yaml"), *place.glob("*.yml")])]
        named = [(str(path.relative_to(folder)), name) for path, name in found if name]
        yield from named
        if named:
            return


def _name_in(path: Path) -> str:
    """A recipe's name, '' for what is none: a look, not a reading."""
    try:
        with path.open(errors="replace") as file:
            text = file.read(65536)
    except OSError:
        return ""
    keys = dict(re.findall(r"^(name|checkpoint|promote):[ \t]*(.*)$", text, re.MULTILINE))
    return keys["name"].strip("'\" ") if len(keys) == 3 else ""


def _run(tables: sqlite3.Connection) -> Run | None:
    row = tables.execute(RUNS).fetchone()
    if row is None:
        return None
    tags = dict(tables.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (row[0],)).fetchall())
    gone = row[1] == "RUNNING" and has_ended(tags.get("featherweight.process", ""))
    told = (tags.get(f"featherweight.{name}", "") for name in ("winner", "recipe", "error"))
    return Run(row[0], "KILLED" if gone else row[1], *told)


def _versions(tables: sqlite3.Connection) -> Iterator[Version]:
    """Those that are somewhere, the latest of each model first."""
    for name, number, stage, recipe in tables.execute(STAGES):
        if stage in ("staging", "production"):
            yield Version(name, int(number), stage, "approval: required" in (recipe or ""))


def _ended(run: Run) -> str:
    if run.status == "RUNNING":
        return "is running"
    if run.status == "FINISHED":
        return f"found {run.winner}" if run.winner not in ("", "none") else "found no variant that keeps the constraints"
    return f"failed: {one_line(run.error, 200)}" if run.status == "FAILED" and run.error else "was stopped"


def told(standing: Standing) -> str:
    """Everything, for a terminal."""
    steps = list(standing.steps())
    width = max(len(step.command) for step in steps)
    lines = [f"{'next' if not number else '':6}{step.command:{width}}  {step.does}" for number, step in enumerate(steps)]
    return "\n".join([*standing.facts, "", *lines, "", "featherweight --help lists every command."])
