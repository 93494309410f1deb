"""The plan: a recipe expanded into a trie of stage nodes. Every path from the root to a leaf is a variant."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from featherweight.errors import RecipeError
from featherweight.measure.spec import BASELINE, DecideSpec
from featherweight.recipe.facts import Facts, checkpoint_source, student_source
from featherweight.recipe.memory import memory_obstacle
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe, RegisterSpec, VariantsSpec
from featherweight.recipe.refusals import Chosen, baseline_type, memory_refusal
from featherweight.recipe.speculating import NONE, Choice, beside_refusal, draft_of, name_of
from featherweight.runtimes.catalog import BASELINE as BASELINE_ENGINE
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ComputeType, ExportSpec, ServingSpec
from featherweight.runtimes.workload import workload_refusal
from featherweight.spec import Spec, Split
from featherweight.system.device import CPU, Device, resolve
from featherweight.system.machine import Machine, describe
from featherweight.text.spec import GateSpec, TextSpec

# Without these there is nothing to measure, nothing to measure against, or nothing to show for it.
ESSENTIAL = (
    *("text/train", "text/calibration", "text/evaluation", "gate", "checkpoint", "baseline", "baseline/evaluate"),
    "baseline/glance",
    *("decide", "register", "promote"),
)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Node:
    """One run of one stage. `id` is its path in the trie; `inputs` maps the stage's input names to node ids.

    engines: those that it measures, side by side; what serves is written by that of its spec. device: where it computes, or what it
    measures is served; None where it computes nothing.
    """

    id: str
    stage: str
    label: str
    spec: Spec
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    engines: tuple[str, ...] = ()
    device: Device | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods and engines that shape its result, each once, as 'module:attribute'."""
        return tuple(dict.fromkeys((*self.spec.parts, *map(RUNTIMES.reference, self.engines))))


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
    told = facts.of(recipe)
    numbers = baseline_type(told, machine.memory_bytes)
    if told:
        reason = workload_refusal(recipe.workload, told, recipe.constraints)
        if reason := reason or memory_refusal(told.size, machine.memory_bytes, numbers):
            raise RecipeError(reason)
    roots = {node.id: node for node in _roots(recipe, where, numbers)}
    nodes = dict(roots)
    size, students = facts.size(recipe), {name: one.size for name, one in facts.by_source.items()}
    variants = [_variant(recipe, BASELINE, (BASELINE,), BASELINE)]
    ruled_out: dict[str, str] = {}
    known = {choice: _chosen(recipe, choice, machine, where, facts) for choice in _choices(recipe)}
    for choice, chosen in known.items():
        name = name_of(choice)
        if reason := chosen.obstacle() or beside_refusal(choice, known, known.__getitem__):
            ruled_out[name] = reason
            continue
        draft = draft_of(chosen, known)
        drafted = [node for node in _chain(recipe, where, *draft) if not node.engines] if draft else []
        chain = [*drafted, *_chain(recipe, where, *choice, draft=draft)]
        if reason := memory_obstacle(chain, roots, size, students, machine.memory_bytes):
            ruled_out[name] = reason
            continue
        nodes.update({node.id: node for node in chain})
        variants.append(_variant(recipe, name, choice, chain[-1].inputs["served"]))
    if ruled_out and len(variants) == 1:
        name, reason = next(iter(ruled_out.items()))
        raise RecipeError(f"every combination is impossible; {name}: {reason}")
    nodes.update({node.id: node for node in _ending(recipe, nodes, variants)})
    return Plan(nodes, tuple(variants), ruled_out)


def _variant(recipe: Recipe, name: str, choices: tuple[str, ...], served: str) -> Variant:
    return Variant(name, choices, served, f"{served}/evaluate", f"{served}/glance" if recipe.search else "")


def _chosen(recipe: Recipe, choice: Choice, machine: Machine, where: Device, facts: Facts) -> Chosen:
    """What a variant would be made by, on `machine`, `where` it is."""
    distill, prune, quantize, serve = choice
    stages = recipe.stages
    distilled, pruned = stages.distill.get(distill), stages.prune.get(prune)
    student = facts.by_source.get(distilled.student) if distilled and distilled.student else None
    quantized, served = stages.quantize.get(quantize), _serve(recipe)[serve]
    known = facts.of(recipe)
    adapters = tuple(recipe.checkpoint.adapters)
    return Chosen(recipe.task, distilled, pruned, quantized, served, machine, where, known, student, adapters)


def _serve(recipe: Recipe) -> dict[str, ServingSpec]:
    """Alternatives of the last stage, by name."""
    both = recipe.stages.compile.keys() & recipe.stages.export.keys()
    if both:
        raise RecipeError(f"'{min(both)}' names both a compile and an export alternative; rename one")
    every: dict[str, ServingSpec] = {**recipe.stages.compile, **recipe.stages.export}
    return {name: _served(recipe, spec) for name, spec in every.items()}


def _served(recipe: Recipe, spec: ServingSpec) -> ServingSpec:
    """An alternative of the last stage, for sequences as long as the workload wants them served, unless it says so itself."""
    wanted = spec.max_tokens if "max_tokens" in spec.model_fields_set else recipe.workload.served_tokens
    return spec.model_copy(update={"max_tokens": max(wanted, recipe.workload.measured_tokens)})


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
            _pick("serve", line.serve, _serve(recipe)),
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


def _roots(recipe: Recipe, where: Device, numbers: ComputeType) -> list[Node]:
    """What every variant shares: the text, its gate, the checkpoint, and the measurement of the baseline, served in `numbers`."""
    text = [Node(f"text/{s}", "text", s, TextSpec(data=recipe.data, split=s), seed=recipe.seed) for s in SPLITS]
    gate = Node("gate", "gate", "text", GateSpec(), {split: f"text/{split}" for split in SPLITS})
    made = recipe.checkpoint.train
    if made is not None:
        root = Node("checkpoint", "train", recipe.name, made, {"text": "text/train"}, recipe.seed, device=where)
    else:
        root = Node("checkpoint", "load", recipe.checkpoint.source or "", checkpoint_source(recipe), device=CPU)
    plain = _served(recipe, ExportSpec.model_validate({"engine": BASELINE_ENGINE, "compute_type": numbers}))
    served = Node(BASELINE, "export", BASELINE_ENGINE, plain, _serving_inputs(root), device=where)
    return [*text, gate, root, served, *_measurements(recipe, served, BASELINE, (BASELINE_ENGINE,))]


def _chain(
    recipe: Recipe, where: Device, distill: str, prune: str, quantize: str, serve: str, draft: Choice | None = None
) -> list[Node]:
    """The nodes of one variant below the checkpoint; equal prefixes of two variants give equal ids.

    draft: the variant that drafts for it, which is served by a node of its name.
    """
    stages, nodes, path, parent = recipe.stages, [], "", "checkpoint"

    def add(stage: str, label: str, spec: Spec, **inputs: str) -> None:
        nonlocal parent
        device = spec.served_on(where) if isinstance(spec, ServingSpec) else where
        nodes.append(Node(path, stage, label, spec, {"checkpoint": parent, **inputs}, recipe.seed, device=device))
        parent = path

    if distill != NONE:
        before = _before_distill(recipe, where, distill)
        nodes += before.values()
        path = distill
        calibrated = {"calibration": "text/calibration"} if stages.distill[distill].choose == "block_influence" else {}
        made = {name: node.id for name, node in before.items()}
        add("distill", distill, stages.distill[distill], text="text/train", **calibrated, **made)
    if prune != NONE:
        spec = stages.prune[prune]
        path = _join(path, prune)
        add("prune", prune, spec, calibration="text/calibration", **({"text": "text/train"} if spec.reads_text else {}))
        if spec.finetune:
            path = f"{path}+finetune"
            add("finetune", prune, spec.finetune, text="text/train", calibration="text/calibration")
    if quantize != NONE:
        path = _join(path.removesuffix("+finetune"), quantize)
        scan = _before_quantize(recipe, where, quantize, path, parent)
        nodes += scan.values()
        made = {name: node.id for name, node in scan.items()}
        add("quantize", quantize, stages.quantize[quantize], text="text/train", calibration="text/calibration", **made)
    path = _join(path.removesuffix("+finetune"), serve)
    stage = "compile" if serve in stages.compile else "export"
    served = _serve(recipe)[serve]
    add(stage, serve, served, calibration="text/calibration", **({"draft": name_of(draft)} if draft else {}))
    beside = (served.engine, BASELINE_ENGINE) if served.speculation else (BASELINE_ENGINE,)
    return [*nodes, *_measurements(recipe, nodes[-1], serve, (served.engine, *beside))]


def _measurements(recipe: Recipe, served: Node, label: str, engines: tuple[str, ...]) -> list[Node]:
    """Of what a node serves: a search's short look, and the whole, each beside the baseline's own."""
    asked = {"evaluate": recipe.workload}
    if recipe.search:
        asked = {"glance": recipe.search.glance(recipe.workload, recipe.objective), **asked}
    beside = {kind: None if served.id == BASELINE else f"{BASELINE}/{kind}" for kind in asked}
    return [
        Node(
            f"{served.id}/{kind}",
            "evaluate",
            label,
            spec,
            _evaluation_inputs(served, beside[kind]),
            recipe.seed,
            engines,
            served.device,
        )
        for kind, spec in asked.items()
    ]


def _ending(recipe: Recipe, nodes: Iterable[str], variants: Iterable[Variant]) -> list[Node]:
    """What every measurement leads to: the choice of the winner, its registration and its promotion.

    The registration reads all that was made, because whatever the winner goes back to is its lineage.
    """
    measured = {variant.name: variant.measured for variant in variants}
    decide = DecideSpec(constraints=recipe.constraints, objective=recipe.objective, variants=tuple(measured))
    register = RegisterSpec(
        model=recipe.promote.model,
        recipe=recipe_text(recipe),
        constraints=recipe.constraints,
        objective=recipe.objective,
        nodes={variant.name: (variant.served, variant.measured) for variant in variants},
    )
    return [
        Node("decide", "decide", "winner", decide, measured, recipe.seed),
        Node("register", "register", recipe.promote.model, register, {"decide": "decide", **{id: id for id in nodes}}, recipe.seed),
        Node("promote", "promote", recipe.promote.stage, recipe.promote, {"registered": "register"}, recipe.seed),
    ]


def _before_distill(recipe: Recipe, where: Device, name: str) -> dict[str, Node]:
    """What a distillation reads beside text and teacher, by input name: a student of its own, the teacher's generations."""
    spec, seed, teacher = recipe.stages.distill[name], recipe.seed, {"checkpoint": "checkpoint"}
    nodes = {}
    if spec.student is not None:
        nodes["student"] = Node(f"{name}+student", "load", spec.student, student_source(recipe, spec.student), device=CPU)
    if spec.prune is not None:
        inputs = {**teacher, "calibration": "text/calibration"}
        pruning = spec.prune.model_copy(update={"finetune": None})
        nodes["student"] = Node(f"{name}+student", "prune", name, pruning, inputs, seed, device=where)
    if spec.generate is not None:
        inputs = {**teacher, "text": "text/train"}
        nodes["generated"] = Node(f"{name}+text", "generate", name, spec.generate, inputs, seed, device=where)
    return nodes


def _before_quantize(recipe: Recipe, where: Device, name: str, path: str, parent: str) -> dict[str, Node]:
    """What a quantization at `path` reads beside text and checkpoint, by input name: the scan that mixed precision asks for."""
    spec, inputs = recipe.stages.quantize[name].sensitivity, {"checkpoint": parent, "calibration": "text/calibration"}
    if spec is None:
        return {}
    return {"sensitivity": Node(f"{path}+sensitivity", "sensitivity", name, spec, inputs, recipe.seed, device=where)}


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _serving_inputs(checkpoint: Node) -> dict[str, str]:
    return {"checkpoint": checkpoint.id, "calibration": "text/calibration"}


def _evaluation_inputs(served: Node, baseline_measurement: str | None) -> dict[str, str]:
    inputs = {"served": served.id, "baseline": BASELINE, "evaluation": "text/evaluation"}
    return inputs if baseline_measurement is None else {**inputs, "baseline_measurement": baseline_measurement}
