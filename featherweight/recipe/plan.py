"""The plan: a recipe expanded into a trie of stage nodes. Every path from the root to a leaf is a variant."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from featherweight.errors import RecipeError
from featherweight.measure.spec import BASELINE
from featherweight.recipe import nodes
from featherweight.recipe.facts import Facts
from featherweight.recipe.memory import memory_obstacle
from featherweight.recipe.nodes import Node
from featherweight.recipe.recipe import Recipe, VariantsSpec
from featherweight.recipe.refusals import Chosen, baseline_type, memory_refusal
from featherweight.recipe.speculating import NONE, Choice, beside_refusal, draft_of, name_of
from featherweight.runtimes.spec import ComputeType
from featherweight.runtimes.workload import workload_refusal
from featherweight.spec import Spec
from featherweight.system.device import Device, resolve
from featherweight.system.machine import Machine, describe

# Without these there is nothing to measure, nothing to measure against, or nothing to show for it.
ESSENTIAL = (
    *("text/train", "text/calibration", "text/evaluation", "gate", "checkpoint", "baseline", "baseline/evaluate"),
    "baseline/glance",
    *("decide", "register", "promote"),
)


@dataclass(frozen=True)
class Variant:
    """A path of the trie: the node that serves it, the node that measures it, and the names of its choices.

    glanced: the node of a search's short look at it; empty where nothing is searched.
    """

    name: str
    choices: tuple[str, ...]
    served: str
    measured: str
    glanced: str = ""


@dataclass(frozen=True)
class Plan:
    """Nodes in an order that respects their inputs; variants; and the combinations ruled out, each with its reason."""

    nodes: Mapping[str, Node]
    variants: tuple[Variant, ...]
    ruled_out: Mapping[str, str]

    def path(self, node: str) -> list[str]:
        """Ids of `node` and everything it is made from, in running order."""
        wanted = {node}
        for id in reversed(list(self.nodes)):
            if id in wanted:
                wanted.update(self.nodes[id].inputs.values())
        return [id for id in self.nodes if id in wanted]


def expand(recipe: Recipe, machine: Machine | None = None, facts: Facts = Facts()) -> Plan:
    """The plan of a recipe for `machine`, this one by default. facts: what its checkpoints tell; nothing is read here.

    Raises RecipeError where nothing is left to run, a name is unknown, or the checkpoint holds no such workload, ToolchainError
    where the recipe wants a device that `machine` does not have.
    """
    machine = machine or describe()
    where = resolve(recipe.device, machine)
    if recipe.checkpoint.train and (reason := recipe.checkpoint.train.refusal()):
        raise RecipeError(reason)
    roots = {node.id: node for node in nodes.roots(recipe, where, _baseline_type(recipe, machine, facts))}
    chains, ruled_out = _chains(recipe, roots, machine, where, facts)
    if ruled_out and not chains:
        name, reason = next(iter(ruled_out.items()))
        raise RecipeError(f"every combination is impossible; {name}: {reason}")
    variants = [_variant(recipe, BASELINE, (BASELINE,), BASELINE)]
    variants += [_variant(recipe, name_of(choice), choice, chain[-1].inputs["served"]) for choice, chain in chains.items()]
    every = roots | {node.id: node for chain in chains.values() for node in chain}
    served_and_measured = {variant.name: (variant.served, variant.measured) for variant in variants}
    ending = {node.id: node for node in nodes.ending(recipe, every, served_and_measured)}
    return Plan(every | ending, tuple(variants), ruled_out)


def _baseline_type(recipe: Recipe, machine: Machine, facts: Facts) -> ComputeType:
    """What the baseline is served in. Raises RecipeError where the checkpoint holds no such workload, or the machine not it."""
    told = facts.of(recipe)
    numbers = baseline_type(told, machine.memory_bytes)
    if told and (
        reason := workload_refusal(recipe.workload, told, recipe.constraints)
        or memory_refusal(told.size, machine.memory_bytes, numbers)
    ):
        raise RecipeError(reason)
    return numbers


def _chains(
    recipe: Recipe, roots: Mapping[str, Node], machine: Machine, where: Device, facts: Facts
) -> tuple[dict[Choice, list[Node]], dict[str, str]]:
    """The nodes of each wanted variant that is possible; and by name why the others are not."""
    size, students = facts.size(recipe), {name: one.size for name, one in facts.by_source.items()}
    known = {choice: _chosen(recipe, choice, machine, where, facts) for choice in _choices(recipe)}
    chains: dict[Choice, list[Node]] = {}
    ruled_out: dict[str, str] = {}
    for choice, chosen in known.items():
        reason = chosen.obstacle() or beside_refusal(choice, known, known.__getitem__)
        chain = [] if reason else _chain(recipe, where, choice, draft_of(chosen, known))
        if reason := reason or memory_obstacle(chain, roots, size, students, machine.memory_bytes):
            ruled_out[name_of(choice)] = reason
        else:
            chains[choice] = chain
    return chains, ruled_out


def _chain(recipe: Recipe, where: Device, choice: Choice, draft: Choice | None) -> list[Node]:
    """The nodes of a variant, behind those that serve the one that drafts for it."""
    drafted = [node for node in nodes.chain(recipe, where, draft) if not node.engines] if draft else []
    return [*drafted, *nodes.chain(recipe, where, choice, draft)]


def _variant(recipe: Recipe, name: str, choices: tuple[str, ...], served: str) -> Variant:
    return Variant(name, choices, served, f"{served}/evaluate", f"{served}/glance" if recipe.search else "")


def _chosen(recipe: Recipe, choice: Choice, machine: Machine, where: Device, facts: Facts) -> Chosen:
    """What a variant would be made by, on `machine`, `where` it is."""
    distill, prune, quantize, serve = choice
    stages = recipe.stages
    distilled, pruned = stages.distill.get(distill), stages.prune.get(prune)
    student = facts.by_source.get(distilled.student) if distilled and distilled.student else None
    quantized, served = stages.quantize.get(quantize), nodes.serving_specs(recipe)[serve]
    known = facts.of(recipe)
    adapters = tuple(recipe.checkpoint.adapters)
    return Chosen(recipe.task, distilled, pruned, quantized, served, machine, where, known, student, adapters)


def _choices(recipe: Recipe) -> Collection[Choice]:
    """Every wanted (distill, prune, quantize, serve), in order and once."""
    stages = recipe.stages
    every = VariantsSpec(distill=(NONE, "*"), prune=(NONE, "*"), quantize=(NONE, "*"))
    seen: dict[Choice, None] = {}
    for line in (every,) if recipe.variants is None else recipe.variants:
        product = itertools.product(
            _pick("distill", line.distill, stages.distill),
            _pick("prune", line.prune, stages.prune),
            _pick("quantize", line.quantize, stages.quantize),
            _pick("serve", line.serve, nodes.serving_specs(recipe)),
        )
        seen.update(dict.fromkeys(product))
    return seen


def _pick(stage: str, patterns: tuple[str, ...], known: Mapping[str, Spec]) -> list[str]:
    """Alternatives that the patterns name, in the patterns' order."""
    picked: list[str] = []
    for pattern in patterns:
        found = [NONE] if pattern == NONE and stage != "serve" else fnmatch.filter(known, pattern)
        if not found and pattern != "*":
            raise RecipeError(f"variants: '{pattern}' names no alternative of {stage}; known: {', '.join(known) or NONE}")
        picked += [name for name in found if name not in picked]
    return picked
