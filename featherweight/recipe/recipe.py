"""The recipe: what to start from, which alternatives to try at each stage, and what counts as winning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from featherweight.checkpoint.spec import OfAdapter
from featherweight.distillation.spec import DistillSpec
from featherweight.measure.spec import ConstraintsSpec, WorkloadSpec, unmeasured
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.search.spec import SearchSpec, spread
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.spec import ModelName, Name, Spec, Task
from featherweight.system.device import Wanted
from featherweight.text.spec import DataSpec
from featherweight.training.spec import TrainSpec

Engine = Literal["local", "ray"]


class CheckpointSpec(Spec):
    """Either `source` (a checkpoint to load) or `train` (one to make).

    base: what an adapter is merged into, where that is not the model that it names. adapter: what becomes of one that lies beside
    full weights. adapters: LoRA folders (or other sources) by the name that a request gives: they are not merged, but kept and
    served beside the one champion, by the engines that can.
    """

    source: str | None = None
    train: TrainSpec | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    base: str | None = None
    adapter: OfAdapter | None = None
    adapters: dict[Name, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of(self) -> CheckpointSpec:
        if (self.source is None) == (self.train is None):
            raise ValueError("give exactly one of 'source' and 'train'")
        if self.train is not None and self.adapters:
            raise ValueError("adapters belong to a checkpoint that is there already; give checkpoint.source")
        return self


class StagesSpec(Spec):
    """Named alternatives of each stage; the names make up the names of the variants."""

    distill: dict[Name, DistillSpec] = Field(default_factory=dict)
    prune: dict[Name, SerializeAsAny[PruneSpec]] = Field(default_factory=dict)
    quantize: dict[Name, SerializeAsAny[QuantizeSpec]] = Field(default_factory=dict)
    compile: dict[Name, SerializeAsAny[CompileSpec]] = Field(default_factory=dict)
    export: dict[Name, SerializeAsAny[ExportSpec]] = Field(default_factory=dict)


class VariantsSpec(Spec):
    """One product of choices: names of alternatives, 'none' to leave the stage out, '*' for every alternative."""

    distill: tuple[str, ...] = ("none",)
    prune: tuple[str, ...] = ("none",)
    quantize: tuple[str, ...] = ("none",)
    serve: tuple[str, ...] = ("*",)

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: (v,) if isinstance(v, str) else v for k, v in value.items()}
        return value


class PromoteSpec(Spec):
    """The registered model, and how far the winner goes by itself: nowhere, 'staging' or 'production'.

    out_of_band: what becomes of an alias or stage that somebody sets in MLflow: undone, kept where the gate lets it pass, or left
    as it is; each is recorded in the history. approval: 'required' lets the winner wait in staging for a person.
    smoke: ask the new champion something on its engine, and go back to the former where it does not answer.
    """

    model: ModelName
    stage: Literal["none", "staging", "production"] = "production"
    out_of_band: Literal["undo", "keep", "tell"] = "undo"
    approval: Literal["none", "required"] = "none"
    smoke: bool = True


class RegisterSpec(Spec):
    """What a winner is registered as, and by what it is judged later. recipe: its whole text.

    nodes: of each variant, by name, the node that serves it and the node that measures it.
    """

    model: str
    recipe: str
    constraints: ConstraintsSpec
    objective: str
    nodes: dict[str, tuple[str, str]]


class Recipe(Spec):
    """A whole optimization.

    task: text from a prefix (Llama, Qwen ...), text from a text (T5, mBART, Marian ...), filling in masks (BERT, RoBERTa ...), or
    an encoder's vectors (feature-extraction), labels of texts or pairs of them, labels of words.
    device: where every stage computes and every variant, the baseline too, is served: 'auto' is the GPU where there is one. An
    alternative of the last stage may say otherwise for itself.
    engine: what runs the stages: this machine, or a Ray cluster, that of RAY_ADDRESS or one that is started here.
    advice: of a recipe that was composed from advice, the new tokens per second that were expected of its variants at the
    objective's batch size, what was to win first. It plays no role in the run; the report holds it against what was measured.
    search: look for the best of the variants within a budget, in place of measuring all.
    """

    quiet = frozenset({"device", "engine", "advice", "search"})

    name: Name
    checkpoint: CheckpointSpec
    task: Task = "text-generation"
    device: Wanted = "auto"
    engine: Engine = "local"
    data: DataSpec
    stages: StagesSpec = StagesSpec()
    variants: tuple[VariantsSpec, ...] | None = None
    workload: WorkloadSpec = WorkloadSpec()
    constraints: ConstraintsSpec = ConstraintsSpec()
    objective: str = Field(default="speedup@1", pattern=r"^(speedup@\d+|ttft@\d+|size|quality)$")
    advice: dict[str, Annotated[float, Field(ge=0)]] | None = None
    search: SearchSpec | None = None
    promote: PromoteSpec
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _with_the_searched(cls, tree: Any) -> Any:
        return spread(tree) if isinstance(tree, dict) and isinstance(tree.get("search"), dict) else tree

    @model_validator(mode="after")
    def _trains_what_it_wants(self) -> Recipe:
        if self.checkpoint.train is not None and self.task != "text-generation":
            raise ValueError(f"checkpoint.train makes a Llama, which is no model for {self.task}; give checkpoint.source")
        return self

    @model_validator(mode="after")
    def _measures_what_it_bounds(self) -> Recipe:
        if reason := unmeasured(self.constraints, self.objective, self.workload):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _has_references(self) -> Recipe:
        if self.workload.references is None:
            return self
        if self.task != "text2text-generation":
            raise ValueError(f"workload.references: a model for {self.task} makes no text of a text; leave it out")
        if self.data.target is None:
            raise ValueError("workload.references wants data.target, the key or column of the texts that are to be written")
        return self

    @model_validator(mode="after")
    def _measures_texts(self) -> Recipe:
        served = {**self.stages.compile, **self.stages.export}
        changing = [name for name, spec in served.items() if spec.changes_texts_alone]
        if changing and self.workload.changed_answers is None:
            raise ValueError(
                f"{changing[0]} writes other texts than its scores tell of; say workload.changed_answers, such as "
                "{prompts: 100, new_tokens: 32}, and constraints.max_changed_answers where it matters"
            )
        return self

    @model_validator(mode="after")
    def _adapts_text(self) -> Recipe:
        if self.checkpoint.adapters and self.task != "text-generation":
            raise ValueError(
                f"checkpoint.adapters are kept beside decoders alone, not for {self.task}; merge one: its folder is the source"
            )
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> Recipe:
        names = [name for stage in type(self.stages).model_fields for name in getattr(self.stages, stage)]
        reserved = {"none", "baseline", "checkpoint", "gate", "text", "decide", "register", "promote"}
        for name in names:
            if names.count(name) > 1 or name in reserved:
                why = "is reserved" if name in reserved else "stands twice"
                raise ValueError(f"the name '{name}' {why} among the stages' alternatives; variants need distinct names")
        return self
