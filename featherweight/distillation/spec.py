"""What a recipe says of distillation, and of the text that a teacher writes for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from featherweight.model.parent import Parent
from featherweight.pruning.spec import PruneSpec
from featherweight.spec import ByStack, Layers, ModelSize, Positive, SequenceLength, Spec, share_of_layers
from featherweight.training.spec import TrainingSpec, unread_sharding


class StackLayers(ByStack):
    """Layers of each stack of an encoder-decoder: how many, or which; null keeps all."""

    encoder: Layers | None = None
    decoder: Layers | None = None


class StackMap(ByStack):
    """The teacher's layer for each of the student's, by stack; null spreads them evenly."""

    encoder: tuple[int, ...] | None = None
    decoder: tuple[int, ...] | None = None


class WritingSpec(Spec):
    """Text that a checkpoint writes: `samples` texts, each begun with `prompt_tokens` of a document of the recipe's.

    A seq2seq model writes its answer to the document instead. beams: beam search, 1 for greedy. temperature: sampling instead.
    """

    samples: Positive = 256
    prompt_tokens: Annotated[int, Field(ge=16)] = 16
    beams: Positive = 1
    temperature: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_search(self) -> WritingSpec:
        if self.temperature is not None and self.beams > 1:
            raise ValueError("give 'beams' or 'temperature', not both")
        return self


class GenerateSpec(WritingSpec):
    """The stage that writes it: texts of up to `sequence` tokens, the prompt included; targets of as many."""

    sequence: SequenceLength

    def refusal(self, parent: Parent) -> str | None:
        """Why `parent` cannot write it, in one line; None where it can."""
        if parent.task != "fill-mask":
            return None
        return f"{parent.task} + distill.sequence_level: an encoder fills in masks and writes no text; leave it out"

    def operations(self, size: ModelSize) -> float:
        return 2.0 * size.parameters * self.beams * self.samples * self.sequence


class SequenceLevelSpec(WritingSpec):
    """Sequence-level distillation (Kim and Rush 2016): the teacher's own text makes up this `share` of what the student reads."""

    share: float = Field(default=0.5, gt=0, le=1)


class DistillSpec(TrainingSpec):
    """A student trained on what the teacher says, beside the text itself.

    The student is one of
    layers: the teacher's own, so many (of each stack) or these; `choose` which: evenly spaced, or those that change their input
        most (block influence, Men et al. 2024);
    student: another checkpoint with the same tokenizer, named as `checkpoint.source` is;
    prune: the teacher, pruned so.
    The loss is kl_weight T^2 D(teacher, student) + (1 - kl_weight) cross-entropy, D as `divergence` names it, plus
    hidden_weight x squared error of hidden states and attention_weight x KL of attention maps, or as `attention_loss` says their
    squared error, between the student's layers and those that `layer_map` names for them.
    teacher_cache: 'top_k' computes the teacher's answers once and keeps the `top_k` likeliest tokens of each; 'auto' does so
    where text is read more than once.
    processes: how many compute each batch together, one device each, or their share of the cores.
    sharded: each of them holds a part of the student's weights, gradients and moments, and the whole teacher (FSDP2).
    """

    quiet = frozenset({"processes", "sharded"})

    layers: Layers | StackLayers | None = None
    choose: Literal["uniform", "block_influence"] = "uniform"
    student: str | None = None
    prune: SerializeAsAny[PruneSpec] | None = None
    temperature: float = Field(default=2.0, gt=0)
    kl_weight: float = Field(default=0.5, ge=0, le=1)
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    hidden_weight: float = Field(default=0.0, ge=0)
    attention_weight: float = Field(default=0.0, ge=0)
    attention_loss: Literal["kl", "mse"] = "kl"
    layer_map: Literal["uniform", "last"] | tuple[int, ...] | StackMap = "uniform"
    sequence_level: SequenceLevelSpec | None = None
    teacher_cache: Literal["auto", "none", "top_k"] = "auto"
    top_k: Positive = 64
    processes: Positive = 1
    sharded: bool = False

    @property
    def unread(self) -> dict[str, str]:
        matched = bool(self.hidden_weight or self.attention_weight)
        cases = (
            (self.layers is None, "without layers", ("choose",)),
            (not matched, "without hidden_weight or attention_weight", ("layer_map",)),
            (not self.attention_weight, "without attention_weight", ("attention_loss",)),
            (self.kl_weight == 0, "with kl_weight 0", ("divergence", "temperature", "teacher_cache", "top_k")),
            (self.teacher_cache == "none", "with teacher_cache none", ("top_k",)),
            (matched, "beside hidden_weight or attention_weight: answers are not kept then", ("top_k",)),
        )
        return {key: reason for holds, reason, keys in cases if holds for key in keys} | unread_sharding(self.processes)

    @property
    def generate(self) -> GenerateSpec | None:
        """What the teacher is to write."""
        if self.sequence_level is None:
            return None
        return GenerateSpec(sequence=self.sequence, **self.sequence_level.model_dump(exclude={"share"}))

    def refusal(self, parent: Parent) -> str | None:
        """Why `parent` cannot be a teacher so, in one line; None where it can."""
        if self.prune is not None and self.prune.other_tokens:
            return (
                f"distill + {self.prune.method}: a student has its teacher's tokenizer; give the pruning as an alternative of "
                "prune, which follows the distillation"
            )
        asked = (self.generate, self.prune)
        return next((reason for one in asked if one and (reason := one.refusal(parent))), None)

    def operations(self, size: ModelSize) -> float:
        return 8.0 * size.parameters * self.steps * self.batch * self.sequence

    def left(self, size: ModelSize) -> ModelSize:
        """The student, where it is made of the teacher; one of its own has a size of its own."""
        if self.prune is not None:
            return self.prune.left(size)
        stacks = (self.layers.encoder, self.layers.decoder) if isinstance(self.layers, StackLayers) else (self.layers,)
        shares = [1.0 if layers is None else share_of_layers(layers, size) for layers in stacks]
        return size.kept(depth=sum(shares) / len(shares))

    @model_validator(mode="after")
    def _room_after_the_prompt(self) -> DistillSpec:
        if self.sequence_level is not None and self.sequence_level.prompt_tokens >= self.sequence:
            raise ValueError(f"'sequence_level.prompt_tokens' leave nothing to write of a sequence of {self.sequence}; lower them")
        return self

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> DistillSpec:
        if self.batch < self.processes:
            raise ValueError(f"batch {self.batch} cannot be split over {self.processes} processes")
        return self

    @model_validator(mode="after")
    def _one_student(self) -> DistillSpec:
        if sum(given is not None for given in (self.layers, self.student, self.prune)) != 1:
            raise ValueError("give exactly one of 'layers', 'student' and 'prune'")
        if self.prune is not None and self.prune.finetune is not None and "finetune" in self.prune.model_fields_set:
            raise ValueError("'prune.finetune' has no place here: distillation is the recovery; leave it out")
        return self

    @model_validator(mode="after")
    def _numbers_to_choose(self) -> DistillSpec:
        wanted = (self.layers.encoder, self.layers.decoder) if isinstance(self.layers, StackLayers) else (self.layers,)
        if self.choose == "block_influence" and (self.layers is None or any(isinstance(one, tuple) for one in wanted)):
            raise ValueError("'choose: block_influence' wants a number of 'layers'")
        return self

    @model_validator(mode="after")
    def _logits_alone_are_kept(self) -> DistillSpec:
        if self.teacher_cache == "top_k" and (self.hidden_weight or self.attention_weight):
            raise ValueError("'teacher_cache: top_k' keeps no hidden states or attention maps; leave it out, or their weights")
        return self
