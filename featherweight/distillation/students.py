"""The student that a distillation trains: some of the teacher's own layers, or a checkpoint with the same tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.matching import Pair, layer_pairs
from featherweight.distillation.spec import DistillSpec, StackLayers
from featherweight.errors import CheckpointError, RecipeError, StageError, refused
from featherweight.model import surgery
from featherweight.model.architecture import LAYOUTS, Role, family_of, task_of
from featherweight.model.facts import CheckpointFacts
from featherweight.pruning.block_influence import block_influence, most_influential
from featherweight.text.documents import read_documents
from featherweight.text.model_inputs import example_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SAMPLES = 32
"""Blocks of calibration text that block influence is measured on."""
PROBED = 8
"""Documents on which two tokenizers are compared beside their vocabularies."""


def student_refusal(spec: DistillSpec, teacher: CheckpointFacts, student: CheckpointFacts | None) -> str | None:
    """Why the distillation cannot be done to a teacher, by what is known of both; None where it can, or where the stage will tell.

    student: of one of its own; None where it is made of the teacher, or not known.
    """
    if spec.student is not None and student is None:
        return None
    reason = refused(require_same_kind, teacher.config, student.config) if student else None
    asked = (spec, teacher.config, student.config if student else None)
    return reason or (refused(matched_layers, *asked) if teacher.sized and spec.prune is None else None)


def matched_layers(spec: DistillSpec, config: PreTrainedConfig, student: PreTrainedConfig | None) -> tuple[Pair, ...]:
    """The pairs of layers that are to be matched, by configs alone; `student` is that of a student made elsewhere.

    Raises RecipeError for layers that are not there, StageError for an architecture that cannot be cut.
    """
    matched = spec.hidden_weight or spec.attention_weight
    if student is not None and not matched:
        return ()
    if config.model_type not in LAYOUTS:
        raise StageError(
            f"distill handles {', '.join(sorted(LAYOUTS))} models, not '{config.model_type}'; give it a student of its own and "
            "no weight to hidden states and attention maps, or leave the stage out"
        )
    sizes = student_sizes(spec, config, student)
    return layer_pairs(spec.layer_map, sizes, surgery.stack_sizes(config)) if matched else ()


def student_sizes(spec: DistillSpec, config: PreTrainedConfig, student: PreTrainedConfig | None) -> dict[Role, int]:
    """Layers of the student's stacks, by config alone. Raises RecipeError for layers that the teacher lacks."""
    if student is not None:
        return surgery.stack_sizes(student)
    return {role: len(layers) for role, layers in even_layers(spec, surgery.stack_sizes(config)).items()}


def even_layers(spec: DistillSpec, sizes: Mapping[Role, int]) -> dict[Role, tuple[int, ...]]:
    """The layers of each stack that `spec.layers` names, evenly spaced where it gives their number only.

    Raises RecipeError for a stack or layers that the teacher lacks.
    """
    if isinstance(spec.layers, StackLayers):
        spec.layers.require_known("distill.layers", sizes)
    chosen = {}
    for role, total in sizes.items():
        wanted: Any = getattr(spec.layers, role) if isinstance(spec.layers, StackLayers) else spec.layers
        chosen[role] = surgery.chosen_layers(total if wanted is None else wanted, total)
    return chosen


def make_student(
    spec: DistillSpec, teacher: PreTrainedModel, checkpoint: Path, student: Path | None, calibration: Path | None, seed: int
) -> PreTrainedModel:
    """The student before training. `checkpoint` is the teacher's folder, `student` that of a student made elsewhere."""
    if student is not None:
        return opening.load_model(student)
    layers = even_layers(spec, surgery.stack_sizes(teacher.config))
    if spec.choose == "block_influence":
        if calibration is None:
            raise RecipeError("distill.choose: block_influence is measured on calibration text: give the stage that input")
        blocks = example_blocks(checkpoint, teacher.config, calibration, spec.sequence, limit=SAMPLES, seed=seed)
        influence = block_influence(teacher, blocks)
        layers = {role: most_influential(influence[role], len(kept)) for role, kept in layers.items()}
    return surgery.copy_layers(teacher, layers)


def require_same_kind(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise CheckpointError for a student of another family than its teacher, or with other token ids, by configs alone."""
    configs = (teacher, student)
    families = [family_of(config) for config in configs]
    if families[0] != families[1]:
        raise CheckpointError(
            f"distill.student is a {families[1]} model and its teacher a {families[0]} one; give one of that kind"
        )
    ends = ("pad_token_id", "decoder_start_token_id") if families[0] == "seq2seq" else ()
    for name in ("vocab_size", *ends):
        theirs, own = (getattr(config, name, None) for config in configs)
        if theirs != own:
            raise CheckpointError(f"distill.student has {name} {own} and its teacher {theirs}; give a student of the teacher's own")


def require_vectors_as_wide(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise RecipeError for a student whose vectors cannot be compared with its teacher's."""
    if task_of(teacher) == "feature-extraction" and student.hidden_size != teacher.hidden_size:
        raise RecipeError(
            f"distill.student makes vectors of {student.hidden_size} numbers, and its teacher of {teacher.hidden_size}; "
            "give one as wide"
        )


def require_same_tokens(checkpoint: Path, student: Path, text: Path) -> None:
    """Refuse a student that reads or writes other token ids than its teacher. Raises CheckpointError, before any weight is read."""
    require_same_kind(*(opening.load_config(folder) for folder in (checkpoint, student)))
    tokenizers = [load_tokenizer(folder) for folder in (checkpoint, student)]
    vocabulary, others = (tokenizer.get_vocab() for tokenizer in tokenizers)
    differing = sorted(token for token, place in vocabulary.items() if others.get(token) != place)
    if differing or len(vocabulary) != len(others):
        named = f"{len(differing)} of {len(vocabulary)} tokens, such as {differing[0]!r}," if differing else "some tokens"
        raise CheckpointError(f"distill.student has another tokenizer than its teacher: {named} differ; give one with the same")
    for document, _ in zip(read_documents(text), range(PROBED), strict=False):
        if len({tuple(tokenizer(document.text, verbose=False).input_ids) for tokenizer in tokenizers}) > 1:
            raise CheckpointError(f"distill.student's tokenizer cuts document {document.id} into other tokens than its teacher's")
