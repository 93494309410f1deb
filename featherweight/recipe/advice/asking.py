"""From what a user names to a question: the checkpoint's facts, the machine, the workload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from featherweight.checkpoint.facts import KnownAtLoad, facts_for_any_task
from featherweight.checkpoint.fetching import SOURCES
from featherweight.checkpoint.inspection import require_task
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, RecipeError, one_line
from featherweight.model.facts import CheckpointFacts
from featherweight.model.positions import context_tokens
from featherweight.recipe.advice.candidates import Question
from featherweight.recipe.advice.expected import LENGTHS, Asked
from featherweight.recipe.advice.hardware import described, roofs_of, with_cards
from featherweight.recipe.advice.measured import measured_before
from featherweight.spec import Task
from featherweight.system.device import Wanted, resolve
from featherweight.system.gpu import Capability
from featherweight.system.machine import Machine, describe


def source_named(name: str) -> str:
    """A whole path, a source with its kind before it, or ORG/NAME of the hub. Raises CheckpointError for what is none of them."""
    if (path := Path(name).expanduser()).exists():
        return str(path.absolute())
    if any(kind and name.startswith(kind) for kind in SOURCES):
        return name
    if name.count("/") == 1 and name[0] not in "./~" and not name.endswith((".gguf", ".yaml")):
        return f"hf:{name}"
    raise CheckpointError(f"{name} is no folder or GGUF file here, and no hf:ORG/NAME, s3://BUCKET/PREFIX or models:/NAME@ALIAS")


def facts_named(source: str, task: Task | None = None) -> CheckpointFacts:
    """What a source tells of its checkpoint. Raises CheckpointError, also where only loading tells, or it is for another task."""
    try:
        facts = facts_for_any_task(LoadSpec(source=source))
    except KnownAtLoad as reason:
        raise CheckpointError(f"{source}: what it holds is known once it is loaded: {one_line(reason)}") from reason
    if task is not None:
        require_task(source, facts.config, task)
    return facts


def machine_asked(
    gpus: int | None, gpu_gib: float | None, capability: str | None, gib: float | None, cards: str = ""
) -> tuple[Machine, bool]:
    """The machine that is asked about, and whether it is this one. cards: GPUs by their name, such as '2xL4'."""
    here = describe()
    asked = described(with_cards(here, cards) if cards else here, gpus, gpu_gib, capability_of(capability), gib)
    return asked, asked == here


def capability_of(text: str | None) -> Capability | None:
    """'9.0' as (9, 0). Raises RecipeError."""
    if text is None:
        return None
    major, _, minor = text.partition(".")
    if not (major.isdigit() and (minor or "0").isdigit()):
        raise RecipeError(f"--compute-capability {text}: give it as CUDA counts, such as 9.0")
    return int(major), int(minor or 0)


def question_of(
    source: str,
    facts: CheckpointFacts,
    machine: Machine,
    here: bool,
    device: Wanted,
    asked: Asked,
    max_loss: float | None,
    workspace: Path,
) -> Question:
    """All of it. Raises ToolchainError where the device is not to be had, RecipeError where the model's context is too short.

    The usual lengths are shortened to what the context holds.
    """
    where = resolve(device, machine)
    longest, writes = context_tokens(facts.config), facts.task == "text-generation"
    if (asked.prompt_tokens, asked.new_tokens) == LENGTHS:
        asked = replace(asked, prompt_tokens=min(LENGTHS[0], longest // 2), new_tokens=min(LENGTHS[1], longest // 2))
    tokens = asked.prompt_tokens + (asked.new_tokens if writes else 0)
    if tokens > longest:
        raise RecipeError(
            f"{tokens} tokens are asked of a model whose context holds {longest}; lower --prompt-tokens or --new-tokens"
        )
    before = measured_before(workspace, source, machine.cpu_model)
    return Question(source, facts, facts.task, machine, roofs_of(machine, where, here), asked, max_loss, here, before)
