"""What a recipe says of training: from nothing, and of recovery."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from featherweight.spec import ModelSize, Positive, SequenceLength, Spec


def unread_sharding(processes: int) -> dict[str, str]:
    """`sharded` means nothing where there is nobody to share with."""
    return {} if processes > 1 else {"sharded": "in one process"}


def sharded_zeros_refusal(stage: str) -> str:
    """Why a sparse checkpoint is not trained in parts."""
    return f"{stage}.sharded: the zeros of a sparse checkpoint are held in whole matrices only; leave sharded out"


class TrainSpec(Spec):
    """A small Llama and its byte-level BPE tokenizer, from nothing.

    processes: how many compute each batch together, one device each, or their share of the cores.
    sharded: each of them holds a part of weights, gradients and moments, and not all (FSDP2).
    """

    quiet = frozenset({"processes", "sharded"})

    vocab_size: int = Field(default=2048, gt=0, le=10_000_000)
    hidden_size: int = Field(default=256, gt=0, le=100_000)
    intermediate_size: int = Field(default=688, gt=0, le=1_000_000)
    layers: int = Field(default=6, gt=0, le=1000)
    heads: int = Field(default=8, gt=0, le=10_000)
    kv_heads: int = Field(default=4, gt=0, le=10_000)
    context: int = Field(default=256, ge=2, le=10_000_000)
    steps: Positive = 300
    batch: Positive = 8
    learning_rate: float = Field(default=3e-3, gt=0)
    tokenizer_bytes: Positive = 4_000_000
    processes: Positive = 1
    sharded: bool = False

    @property
    def unread(self) -> dict[str, str]:
        return unread_sharding(self.processes)

    @property
    def llama(self) -> dict[str, Any]:
        """Its sizes by the names of transformers' LlamaConfig."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
        }

    def refusal(self) -> str | None:
        """Why no Llama can have these sizes; None where one can."""
        if self.hidden_size % (2 * self.heads):
            return f"train: hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}"
        if self.heads % self.kv_heads:
            return f"train: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}"
        if self.batch < self.processes:
            return f"train: batch {self.batch} cannot be split over {self.processes} processes"
        if self.vocab_size < 256 + 3:
            return f"train: vocab_size {self.vocab_size} must be at least 259: every byte, BOS, EOS and padding"
        return None

    def operations(self, size: ModelSize) -> float:
        return 6.0 * size.parameters * self.steps * self.batch * self.context


class TrainingSpec(Spec):
    """What every training on text is told: how long, on how much at once, how fast."""

    steps: Positive = 100
    batch: Positive = 8
    sequence: SequenceLength = 128
    learning_rate: float = Field(default=3e-4, gt=0)


class LoraSpec(Spec):
    """Low-rank adapters, merged into the weights when trained: W + alpha / rank · B A.

    targets: names of linear layers, such as q_proj; by default all but the output head.
    """

    rank: Positive = 8
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class FinetuneSpec(TrainingSpec):
    """Recovery training, AdamW with warm-up and a cosine schedule: of all weights, or of `lora` adapters alone.

    warmup: share of the steps over which the learning rate rises.
    accumulate: parts that a batch is computed in, one after the other: less memory, the same step.
    patience: stop after so many measurements of the held-out loss in a row above the best, whose weights are kept.
    evaluate_every: steps between these measurements; by default a tenth of all steps where `patience` is given.
    save_every_s: seconds between the saves that a killed training resumes from.
    processes: how many compute each batch together, one device each, or their share of the cores.
    sharded: each of them holds a part of weights, gradients and moments, and not all (FSDP2).
    """

    quiet = frozenset({"sharded"})

    warmup: float = Field(default=0.05, ge=0, lt=1)
    accumulate: Positive = 1
    lora: LoraSpec | None = None
    patience: Positive | None = None
    evaluate_every: Positive | None = None
    save_every_s: float = Field(default=60.0, ge=0)
    processes: Positive = 1
    sharded: bool = False

    @property
    def unread(self) -> dict[str, str]:
        return unread_sharding(self.processes)

    def operations(self, size: ModelSize) -> float:
        """Adapters need no gradient of the weights, which is a third of the work."""
        return (4.0 if self.lora else 6.0) * size.parameters * self.steps * self.batch * self.sequence

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> FinetuneSpec:
        if self.batch < self.accumulate * self.processes:
            raise ValueError(f"batch {self.batch} cannot be split into accumulate {self.accumulate} x processes {self.processes}")
        return self
