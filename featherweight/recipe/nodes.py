"""The nodes of a plan: what every variant shares, the chain of stages of one, and what all measurements lead to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from featherweight.errors import RecipeError
from featherweight.measure.spec import BASELINE, DecideSpec
from featherweight.recipe.facts import checkpoint_source, student_source
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe, RegisterSpec
from featherweight.recipe.speculating import NONE, Choice, name_of
from featherweight.runtimes.catalog import BASELINE as BASELINE_ENGINE
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ComputeType, ExportSpec, ServingSpec
from featherweight.spec import Spec, Split
from featherweight.system.device import CPU, Device
from featherweight.text.spec import GateSpec, TextSpec

SPLITS: tuple[Split, ...] = get_args(Split)
FINETUNED = "+finetune"
"""What the path of a node is marked with that makes good what pruning cost; what comes behind stands below the pruning."""


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


def serving_specs(recipe: Recipe) -> dict[str, ServingSpec]:
    """Alternatives of the last stage, by name."""
    both = recipe.stages.compile.keys() & recipe.stages.export.keys()
    if both:
        raise RecipeError(f"'{min(both)}' names both a compile and an export alternative; rename one")
    every: dict[str, ServingSpec] = {**recipe.stages.compile, **recipe.stages.export}
    return {name: _as_long_as_wanted(recipe, spec) for name, spec in every.items()}


def _as_long_as_wanted(recipe: Recipe, spec: ServingSpec) -> ServingSpec:
    """An alternative of the last stage, for sequences as long as the workload wants them served, unless it says so itself."""
    wanted = spec.max_tokens if "max_tokens" in spec.model_fields_set else recipe.workload.served_tokens
    return spec.model_copy(update={"max_tokens": max(wanted, recipe.workload.measured_tokens)})


def roots(recipe: Recipe, where: Device, numbers: ComputeType) -> list[Node]:
    """What every variant shares: the text, its gate, the checkpoint, and the measurement of the baseline, served in `numbers`."""
    text = [Node(f"text/{s}", "text", s, TextSpec(data=recipe.data, split=s), seed=recipe.seed) for s in SPLITS]
    gate = Node("gate", "gate", "text", GateSpec(), {split: f"text/{split}" for split in SPLITS})
    made = recipe.checkpoint.train
    if made is not None:
        root = Node("checkpoint", "train", recipe.name, made, {"text": "text/train"}, recipe.seed, device=where)
    else:
        root = Node("checkpoint", "load", recipe.checkpoint.source or "", checkpoint_source(recipe), device=CPU)
    plain = _as_long_as_wanted(recipe, ExportSpec.model_validate({"engine": BASELINE_ENGINE, "compute_type": numbers}))
    served = Node(BASELINE, "export", BASELINE_ENGINE, plain, _serving_inputs(root), device=where)
    return [*text, gate, root, served, *_measurements(recipe, served, BASELINE, (BASELINE_ENGINE,))]


def chain(recipe: Recipe, where: Device, choice: Choice, draft: Choice | None = None) -> list[Node]:
    """The nodes of one variant below the checkpoint; equal prefixes of two variants give equal ids.

    draft: the variant that drafts for it, which is served by a node of its name.
    """
    distill, prune, quantize, serve = choice
    grown = _Chain(recipe, where)
    if distill != NONE:
        grown.distill(distill)
    if prune != NONE:
        grown.prune(prune)
    if quantize != NONE:
        grown.quantize(quantize)
    grown.serve(serve, draft)
    return grown.nodes


class _Chain:
    """Grows by a stage at a time: `parent` is the node that the next one works on, `path` the id of the last."""

    def __init__(self, recipe: Recipe, where: Device) -> None:
        self.recipe, self.stages, self.where = recipe, recipe.stages, where
        self.nodes: list[Node] = []
        self.path, self.parent = "", "checkpoint"

    def distill(self, name: str) -> None:
        spec, made = self.stages.distill[name], self._add_before(_before_distill(self.recipe, self.where, name))
        calibrated = {"calibration": "text/calibration"} if spec.choose == "block_influence" else {}
        self._go_down(name)
        self._add("distill", name, spec, text="text/train", **calibrated, **made)

    def prune(self, name: str) -> None:
        spec = self.stages.prune[name]
        self._go_down(name)
        self._add("prune", name, spec, calibration="text/calibration", **({"text": "text/train"} if spec.reads_text else {}))
        if spec.finetune:
            self.path += FINETUNED
            self._add("finetune", name, spec.finetune, text="text/train", calibration="text/calibration")

    def quantize(self, name: str) -> None:
        self._go_down(name)
        made = self._add_before(_before_quantize(self.recipe, self.where, name, self.path, self.parent))
        self._add("quantize", name, self.stages.quantize[name], text="text/train", calibration="text/calibration", **made)

    def serve(self, name: str, draft: Choice | None) -> None:
        """Served, and measured beside the baseline; what drafts is measured as well."""
        spec, stage = serving_specs(self.recipe)[name], "compile" if name in self.stages.compile else "export"
        self._go_down(name)
        self._add(stage, name, spec, calibration="text/calibration", **({"draft": name_of(draft)} if draft else {}))
        engines = (spec.engine, *((spec.engine,) if spec.speculation else ()), BASELINE_ENGINE)
        self.nodes += _measurements(self.recipe, self.nodes[-1], name, engines)

    def _go_down(self, name: str) -> None:
        self.path = f"{self.path.removesuffix(FINETUNED)}/{name}".removeprefix("/")

    def _add(self, stage: str, label: str, spec: Spec, **inputs: str) -> None:
        device = spec.served_on(self.where) if isinstance(spec, ServingSpec) else self.where
        read = {"checkpoint": self.parent, **inputs}
        self.nodes.append(Node(self.path, stage, label, spec, read, self.recipe.seed, device=device))
        self.parent = self.path

    def _add_before(self, nodes: Mapping[str, Node]) -> dict[str, str]:
        """Nodes that the next one reads beside its checkpoint, by input name; gives back their ids."""
        self.nodes += nodes.values()
        return {name: node.id for name, node in nodes.items()}


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


def ending(recipe: Recipe, nodes: Iterable[str], variants: Mapping[str, tuple[str, str]]) -> list[Node]:
    """What every measurement leads to: the choice of the winner, its registration and its promotion.

    The registration reads all that was made, because whatever the winner goes back to is its lineage.
    nodes: ids of all of it. variants: the nodes that serve and measure each, by its name.
    """
    measured = {name: measured for name, (_, measured) in variants.items()}
    decide = DecideSpec(constraints=recipe.constraints, objective=recipe.objective, variants=tuple(measured))
    register = RegisterSpec(
        model=recipe.promote.model,
        recipe=recipe_text(recipe),
        constraints=recipe.constraints,
        objective=recipe.objective,
        nodes=dict(variants),
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


def _serving_inputs(checkpoint: Node) -> dict[str, str]:
    return {"checkpoint": checkpoint.id, "calibration": "text/calibration"}


def _evaluation_inputs(served: Node, baseline_measurement: str | None) -> dict[str, str]:
    inputs = {"served": served.id, "baseline": BASELINE, "evaluation": "text/evaluation"}
    return inputs if baseline_measurement is None else {**inputs, "baseline_measurement": baseline_measurement}
