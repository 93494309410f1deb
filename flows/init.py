"""`featherweight init`: six questions, and the commented recipe that their answers come to."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from featherweight.errors import FeatherweightError, RecipeError
from featherweight.recipe.advice.asking import facts_named, source_named
from featherweight.recipe.advice.composing import Composed
from featherweight.recipe.reading import load_recipe
from flows.advise import share_of
from flows.composed import Wanted, budget_of, composed, machine_named, text_named, use_of

FLAGS = {"text": "--text", "use": "--for", "machine": "--machine", "max_loss": "--max-loss", "budget": "--budget"}


@dataclass(frozen=True)
class Question:
    """One of the six. default: what Enter answers, None where an answer is needed. check: raises for what is no answer."""

    key: str
    words: str
    default: str | None
    check: Callable[[str], object]


QUESTIONS = (
    Question(
        "checkpoint",
        "Which checkpoint? A folder, a GGUF file, hf:ORG/NAME, s3://BUCKET/PREFIX or models:/NAME@ALIAS",
        None,
        lambda answer: facts_named(source_named(answer)),
    ),
    Question("text", "Which text is like its own? A file, a folder or s3://...; none: Python's own source", "none", text_named),
    Question("use", "What for? one (a request at a time), users:16 (so many at once), batch:8 (jobs in batches)", "one", use_of),
    Question("machine", "Which machine will serve it? this, cpu, or its GPUs, such as L4 or 2xH100", "this", machine_named),
    Question("max_loss", "How much quality may it lose? A share, or none for no bound", "1%", share_of),
    Question("budget", "How long may the optimization take?", "10m", budget_of),
)


def answers(ask: Callable[[str], str], said: Wanted) -> tuple[str, Wanted]:
    """The checkpoint, and what is wanted of it, where Enter keeps what was said; what is no answer is asked for again.

    Raises RecipeError where the answers end too early.
    """
    found = {}
    for number, question in enumerate(QUESTIONS, 1):
        default = getattr(said, question.key, None) or question.default
        found[question.key] = _answer(f"{number}/6 {question.words}", question, default, ask)
    return found.pop("checkpoint"), Wanted(**found)


def _answer(words: str, question: Question, default: str | None, ask: Callable[[str], str]) -> str:
    while True:
        try:
            given = ask(f"{words}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError as end:
            raise RecipeError("the answers ended before the last question; nothing was written") from end
        if given is None:
            continue
        try:
            question.check(given)
            return given
        except FeatherweightError as error:
            print(f"  {error}", file=sys.stderr)


def asker() -> Callable[[str], str]:
    """Asks at the terminal. Raises RecipeError, with the words that need no terminal, where there is none."""
    if not sys.stdin.isatty():
        raise RecipeError("there is no terminal to ask at: give the answers, as in `featherweight init CHECKPOINT --text FILE`")
    return input


def write_recipe(checkpoint: str, wanted: Wanted, path: Path, workspace: Path, force: bool) -> Composed:
    """Compose the recipe and write it, valid or not at all. Raises RecipeError where a file is there that is not to go."""
    if path.exists() and not force:
        raise RecipeError(f"{path} is there already; --force replaces it, --out names another")
    made = composed(checkpoint, wanted, workspace)
    again = shlex.join(["featherweight", "init", checkpoint, *_said(wanted), "--out", str(path)])
    made = replace(made, text=f"# {' '.join(again.split())}\n# {next_step(wanted, path)}\n#\n{made.text}")
    _place(made, path, force)
    return made


def next_step(wanted: Wanted, path: Path) -> str:
    """What to do with the recipe: measurements are of the machine that is to serve."""
    run = shlex.join(["featherweight", "plan", str(path)])
    cards = machine_named(wanted.machine).cards
    return f"on a machine with {cards}: {run}" if cards else f"next: {run}"


def _said(wanted: Wanted) -> list[str]:
    """What is wanted, as flags, without what is wanted anyway."""
    usual = Wanted()
    said = {flag: value for key, flag in FLAGS.items() if (value := getattr(wanted, key)) != getattr(usual, key)}
    return [word for pair in said.items() for word in pair]


def _place(made: Composed, path: Path, force: bool) -> None:
    """The recipe's file, once it was read back; one that came meanwhile stays, unless it is to be replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".recipe-") as folder:
            part = made.write(Path(folder) / path.name)
            load_recipe(part)
            part.replace(path) if force else os.link(part, path)
    except FileExistsError as error:
        raise RecipeError(f"{path} is there already; --force replaces it, --out names another") from error
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from error
