"""What a recipe's checkpoints tell of themselves when its plan is made: the one that is optimized, and students of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from featherweight.checkpoint.facts import KnownAtLoad, read_facts
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import ServiceError, one_line
from featherweight.measure import benchmark_files, references
from featherweight.model.facts import CheckpointFacts, Values
from featherweight.recipe.recipe import Recipe
from featherweight.spec import ModelSize
from featherweight.training.spec import TrainSpec


@dataclass(frozen=True)
class Facts:
    """By source. notes: of each source that tells nothing before it is loaded, why."""

    by_source: Mapping[str, CheckpointFacts] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, recipe: Recipe) -> CheckpointFacts | None:
        """Those of the checkpoint that the recipe optimizes; None where they are not known."""
        made = recipe.checkpoint.train
        return trained(made) if made else self.by_source.get(recipe.checkpoint.source or "")

    def size(self, recipe: Recipe) -> ModelSize:
        """How large the checkpoint is; nothing where that is not known."""
        known = self.of(recipe)
        return known.size if known else ModelSize(0)

    @classmethod
    def read(cls, recipe: Recipe) -> Facts:
        """Look at every source that the recipe names. Raises CheckpointError for a checkpoint that cannot be loaded, and for
        the workload as benchmark_files.require and references.require do."""
        benchmark_files.require(recipe.workload)
        references.require(recipe.workload)
        found: dict[str, CheckpointFacts] = {}
        notes = []
        for spec in sources(recipe):
            try:
                known = found[spec.source] = read_facts(spec)
            except (KnownAtLoad, ServiceError) as reason:
                notes.append(f"{spec.source}: what it holds is known once it is loaded: {one_line(reason)}")
                continue
            if known.opened and known.opened.chat and known.task == "text-generation":
                notes.append(
                    f"{spec.source}: its chat template writes no conversation ({known.opened.chat}), so that prompts alone are "
                    "answered; mend the template for more"
                )
            if senses := known.other_senses:
                notes.append(f"{spec.source}: its text alone is optimized, measured and served, without {' and '.join(senses)}")
        return cls(found, tuple(notes))


def trained(spec: TrainSpec) -> CheckpointFacts:
    """Those of the Llama that a recipe trains from nothing."""
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "is_encoder_decoder": False, "pad_token_id": None}
    inside = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    return CheckpointFacts(Values({"class": "LlamaConfig", "values": kind | inside | spec.llama, "names": {}}))


def sources(recipe: Recipe) -> list[LoadSpec]:
    """What the recipe loads, the checkpoint first; nothing for one that is trained from nothing."""
    students = [spec.student for spec in recipe.stages.distill.values() if spec.student]
    first = [checkpoint_source(recipe)] if recipe.checkpoint.source else []
    return first + [student_source(recipe, name) for name in dict.fromkeys(students)]


def checkpoint_source(recipe: Recipe) -> LoadSpec:
    """The recipe's checkpoint as a load stage is asked for it."""
    return LoadSpec(**recipe.checkpoint.model_dump(exclude={"train"}), task=recipe.task)


def student_source(recipe: Recipe, source: str) -> LoadSpec:
    """A student does what the recipe's own checkpoint does, and is trusted as far."""
    trust = recipe.checkpoint.model_dump(include={"allow_pickle", "trust_remote_code"})
    return LoadSpec(source=source, task=recipe.task, **trust)
