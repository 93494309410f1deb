"""The recipe: what to start from, which alternatives to try at each stage, and what counts as winning."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from featherweight.errors import RecipeError, nearest, one_line
from featherweight.grid import grid_named

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Positive = Annotated[int, Field(gt=0)]
# The first token of a sequence is only read: one alone leaves nothing to predict.
SequenceLength = Annotated[int, Field(ge=2)]
Split = Literal["train", "calibration", "evaluation"]
Share = Annotated[float, Field(gt=0, lt=1)]
Task = Literal["text-generation", "text2text-generation", "fill-mask"]
ComputeType = Literal[
    "float32", "bfloat16", "float16", "int8", "int8_float32", "int8_float16", "w8a16", "w4a16", "fp8", "nf4", "llm.int8"
]
TorchEngine = Literal["torch-dynamic", "torch-static", "torchao-int8", "torchao-int4", "torchao-int8-dynamic"]


def _known_grid(name: str) -> str:
    try:
        return grid_named(name).name
    except RecipeError as error:
        raise ValueError(str(error)) from error


GridName = Annotated[str, AfterValidator(_known_grid)]


class Spec(BaseModel):
    """Frozen, and strict: a key that is misspelt, or that the rest leaves without a meaning, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def unread(self) -> dict[str, str]:
        """Keys without a meaning here, such as the criterion of a method that asks none, and what makes them so."""
        return {}

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        for key, reason in self.unread.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} plays no role {reason}; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a dump is valid in its turn, and that no cache key holds what changes nothing."""
        return {key: value for key, value in dump(self).items() if key not in self.unread}


class TrainSpec(Spec):
    """A small Llama and its byte-level BPE tokenizer, from nothing."""

    vocab_size: Positive = 2048
    hidden_size: Positive = 256
    intermediate_size: Positive = 688
    layers: Positive = 6
    heads: Positive = 8
    kv_heads: Positive = 4
    context: SequenceLength = 256
    steps: Positive = 300
    batch: Positive = 8
    learning_rate: float = Field(default=3e-3, gt=0)
    tokenizer_bytes: Positive = 4_000_000


class CheckpointSpec(Spec):
    """Either `source` (a checkpoint to load) or `train` (one to make)."""

    source: str | None = None
    train: TrainSpec | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> CheckpointSpec:
        if (self.source is None) == (self.train is None):
            raise ValueError("give exactly one of 'source' and 'train'")
        return self


class LoadSpec(CheckpointSpec):
    """A checkpoint, and what the recipe wants it to do, which its architecture must be made for."""

    task: Task = "text-generation"


class DataSpec(Spec):
    """Text, split by whole documents. `evaluation` and `calibration` are shares held out of `source`, or sources of their own.

    field, target: keys of a .jsonl line; `target` is what a seq2seq model is to make of the text (a translation, a summary).
    """

    source: str
    pattern: str = "**/*"
    field: str = "text"
    target: str | None = None
    separator: str | None = None
    evaluation: Share | str = 0.05
    calibration: Share | str = 0.05
    max_bytes: Positive | None = None


class TextSpec(Spec):
    """One split of the recipe's text."""

    data: DataSpec
    split: Split


class GateSpec(Spec):
    """Bounds of the data gate. A document overlaps another split where that share of its 13-word shingles stands there."""

    max_overlap: Share = 0.5


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
    """

    warmup: float = Field(default=0.05, ge=0, lt=1)
    accumulate: Positive = 1
    lora: LoraSpec | None = None
    patience: Positive | None = None
    evaluate_every: Positive | None = None
    save_every_s: float = Field(default=60.0, ge=0)
    processes: Positive = 1

    @model_validator(mode="after")
    def _parts_are_not_empty(self) -> FinetuneSpec:
        if self.batch < self.accumulate * self.processes:
            raise ValueError(f"batch {self.batch} cannot be split into accumulate {self.accumulate} x processes {self.processes}")
        return self


PRUNE_KEYS = {
    "structured": ("criterion", "ratio", "scope", "attention", "mlp"),
    "depth": ("ratio", "layers", "stack"),
    "width": ("criterion", "ratio", "hidden"),
    "attention": ("kv_heads",),
    "sparse": ("criterion", "sparsity", "pattern"),
}
"""What a pruning method reads, beside the keys that all of them do."""


class PruneSpec(Spec):
    """A smaller model, then recovery training.

    structured: LLM-Pruner's cut of attention groups and MLP channels by `ratio`. attention: heads too; auto: where a config can
    have a number of heads that its hidden size does not follow from. scope: global ranks the MLP channels of all layers
    together, which CTranslate2 alone serves at a gain.
    depth: whole layers of least influence, down to `layers` (a number, or which to keep), or by `ratio`, in every `stack` or one.
    width: the hidden size, to `hidden` or by `ratio`; criterion activation is Minitron's.
    attention: key/value heads pooled to `kv_heads` (1: multi-query), all query heads stay.
    sparse: single weights become zero, in matrices of the same shape, by `criterion` magnitude, wanda (the default there) or
    sparsegpt: the share `sparsity` of them (0.5), or by `pattern` all but N of every M neighbours in a row ("2:4"). Judged on 64
    blocks of 128 tokens by default. No engine here is faster for it.
    """

    method: Literal["structured", "depth", "width", "attention", "sparse"] = "structured"
    criterion: Literal[
        "vectorize",
        "param_first",
        "param_second",
        "param_mix",
        "l1",
        "l2",
        "random",
        "activation",
        "magnitude",
        "wanda",
        "sparsegpt",
    ] = "param_first"
    ratio: Share = 0.25
    sparsity: Share | None = None
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None
    scope: Literal["uniform", "global"] = "uniform"
    attention: bool | Literal["auto"] = "auto"
    mlp: bool = True
    hidden: Positive | None = None
    kv_heads: Positive | None = None
    samples: Positive = 10
    sequence: SequenceLength = 64
    layers: Positive | tuple[int, ...] | None = None
    stack: Literal["all", "encoder", "decoder"] = "all"
    finetune: FinetuneSpec | None = FinetuneSpec()

    @property
    def unread(self) -> dict[str, str]:
        others = [key for keys in PRUNE_KEYS.values() for key in keys if key not in PRUNE_KEYS[self.method]]
        size = next((key for key in ("hidden", "layers") if getattr(self, key) is not None), None)
        return dict.fromkeys(others, f"with method {self.method}") | ({"ratio": f"beside {size}"} if size else {})

    @model_validator(mode="before")
    @classmethod
    def _sparse_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("method") != "sparse":
            return value
        share = {} if value.get("pattern") else {"sparsity": 0.5}
        return {"criterion": "wanda", "samples": 64, "sequence": 128, **share, **value}

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> PruneSpec:
        if self.method == "attention" and self.kv_heads is None:
            raise ValueError("method attention wants kv_heads: how many key/value heads are to be left (1: multi-query)")
        if self.criterion == "activation" and self.method != "width":
            raise ValueError(f"criterion activation is for method width, not {self.method}")
        if self.scope == "global" and not self.mlp:
            raise ValueError("scope global ranks MLP channels: it wants mlp")
        return self

    @model_validator(mode="after")
    def _sparse_or_not(self) -> PruneSpec:
        sparse = self.criterion in ("magnitude", "wanda", "sparsegpt")
        if sparse != (self.method == "sparse"):
            raise ValueError(f"criterion {self.criterion} is {'' if sparse else 'not '}for method sparse, not {self.method}")
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either sparsity (a share) or pattern ('2:4'), not both")
        kept, _, of = (self.pattern or "1:2").partition(":")
        if int(kept) >= int(of):
            raise ValueError(f"pattern {self.pattern} removes nothing; N:M keeps N of every M weights, as 2:4 does")
        return self


class MixedSpec(Spec):
    """The most sensitive matrices on a finer grid: as few of them as hold the predicted loss of quality to `budget` (a share).

    A scan rounds each matrix alone, on `samples` blocks of calibration text.
    """

    grid: GridName = "int8-g32"
    budget: float = Field(default=0.01, gt=0)
    samples: Positive = 16


class SensitivitySpec(Spec):
    """The scan behind `quantize.mixed`: the grids of body and head, and the finer one."""

    grid: GridName
    head: GridName | None
    finer: GridName
    scale: Literal["absmax", "mse"]
    samples: Positive
    sequence: SequenceLength


Layers = Positive | tuple[Annotated[int, Field(ge=0)], ...]


class ByStack(Spec):
    """Something for each stack of an encoder-decoder; null where it is not said."""

    encoder: Any = None
    decoder: Any = None

    def require_known(self, key: str, stacks: Collection[str]) -> None:
        """Raise RecipeError, which names the recipe's `key`, for a stack that the model does not have."""
        for role in self.model_dump(exclude_none=True).keys() - set(stacks):
            raise RecipeError(f"{key}.{role}: the model has no {role}; leave it out")


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
    """

    layers: Layers | StackLayers | None = None
    choose: Literal["uniform", "block_influence"] = "uniform"
    student: str | None = None
    prune: PruneSpec | None = None
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
        return {key: reason for holds, reason, keys in cases if holds for key in keys}

    @property
    def generate(self) -> GenerateSpec | None:
        """What the teacher is to write."""
        if self.sequence_level is None:
            return None
        return GenerateSpec(sequence=self.sequence, **self.sequence_level.model_dump(exclude={"share"}))

    @model_validator(mode="after")
    def _room_after_the_prompt(self) -> DistillSpec:
        if self.sequence_level is not None and self.sequence_level.prompt_tokens >= self.sequence:
            raise ValueError(f"'sequence_level.prompt_tokens' leave nothing to write of a sequence of {self.sequence}; lower them")
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


QAT_KEYS = ("steps", "batch", "learning_rate", "distill", "start", "generated_tokens")


class QuantizeSpec(Spec):
    """Weights moved to a grid. `head` is the grid of the embedding and the output head; null leaves both in float.

    smooth: channels scaled against each other before the method rounds. The methods smoothquant and awq are rtn with it.
    scale: steps that hold the largest weight of a group, or those of least squared error (clipping a few).
    start: the rounding that QAT begins from.
    generated_tokens: text that the checkpoint itself writes for QAT to train on, beside the recipe's.
    mixed: keeps the most sensitive matrices on a finer grid, whatever the method.
    """

    method: Literal["rtn", "gptq", "smoothquant", "awq", "qat"] = "rtn"
    smooth: Literal["none", "smoothquant", "awq"] = "none"
    grid: GridName = "int8"
    head: GridName | None = "int8"
    samples: Positive = 64
    sequence: SequenceLength = 128
    steps: Positive = 100
    batch: Positive = 8
    learning_rate: float = Field(default=1e-5, gt=0)
    distill: bool = True
    scale: Literal["absmax", "mse"] = "absmax"
    start: Literal["rtn", "gptq"] = "gptq"
    generated_tokens: int = Field(default=0, ge=0)
    mixed: MixedSpec | None = None

    @property
    def unread(self) -> dict[str, str]:
        return {} if self.method == "qat" else dict.fromkeys(QAT_KEYS, f"with method {self.method}")

    @property
    def sensitivity(self) -> SensitivitySpec | None:
        """The scan that `mixed` asks for."""
        if self.mixed is None:
            return None
        given = self.model_dump(include={"grid", "head", "scale", "sequence"})
        return SensitivitySpec(finer=self.mixed.grid, samples=self.mixed.samples, **given)

    @model_validator(mode="after")
    def _smooth_once(self) -> QuantizeSpec:
        if self.method in ("smoothquant", "awq") and self.smooth not in ("none", self.method):
            raise ValueError(f"method {self.method} smooths already; for another smoothing take method rtn, gptq or qat")
        return self

    @model_validator(mode="after")
    def _qat_on_integers(self) -> QuantizeSpec:
        names = [self.grid, self.head, self.mixed and self.mixed.grid]
        if self.method == "qat" and any(grid_named(name).kind == "float" for name in names if name):
            raise ValueError("qat trains on integer grids; for fp8 take gptq, awq or rtn")
        return self

    @model_validator(mode="after")
    def _mixed_is_finer(self) -> QuantizeSpec:
        if self.mixed is not None and grid_named(self.mixed.grid).fineness <= grid_named(self.grid).fineness:
            raise ValueError(f"mixed.grid {self.mixed.grid} is no finer than grid {self.grid}; give a finer one")
        return self


class CompileSpec(Spec):
    """ONNX Runtime GenAI, or torch.compile. `precision` rounds here only where no quantize stage chose the weights."""

    engine: Literal["onnxruntime-genai", "torch-compile"]
    precision: Literal["float32", "int8", "int4"] = "float32"


class ExportSpec(Spec):
    """CTranslate2, vLLM, the plain PyTorch folder, or PyTorch with quantized layers: torch's own, or torchao's.

    compute_type, for CTranslate2: float32, int8, int8_float32, or on CUDA int8_float16, bfloat16, float16; for vLLM: float32,
    bfloat16, float16, w8a8 (or int8), w8a16, w4a16, fp8; for torch: the three floats, or on CUDA bitsandbytes' nf4 and llm.int8.
    reduce_range: 'auto' means where the CPU has no VNNI; CTranslate2's int8 only.
    kv_cache: what vLLM keeps keys and values in, null for its own float.
    """

    engine: Literal["ctranslate2", "vllm", "torch", TorchEngine]
    compute_type: ComputeType = "float32"
    reduce_range: bool | Literal["auto"] = "auto"
    kv_cache: Literal["fp8"] | None = None

    @property
    def unread(self) -> dict[str, str]:
        cases = (("compute_type", self.engine in get_args(TorchEngine)), ("reduce_range", self.engine != "ctranslate2"))
        return {key: f"with engine {self.engine}" for key, holds in cases if holds}

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """vLLM's w8a8 is what int8 means there."""
        if isinstance(value, dict) and value.get("compute_type") == "w8a8":
            return value | {"compute_type": "int8"}
        return value


class StagesSpec(Spec):
    """Named alternatives of each stage; the names make up the names of the variants."""

    distill: dict[Name, DistillSpec] = {}
    prune: dict[Name, PruneSpec] = {}
    quantize: dict[Name, QuantizeSpec] = {}
    compile: dict[Name, CompileSpec] = {}
    export: dict[Name, ExportSpec] = {}


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


class WorkloadSpec(Spec):
    """What is measured: generation from `prompt_tokens` to `new_tokens`, and perplexity over `windows` windows of text.

    A seq2seq model encodes a source of `prompt_tokens` and decodes `new_tokens`. For an encoder one pass over `prompt_tokens` is
    a generation: `new_tokens` plays no role, and tokens per second are those that it has read.

    threads: the counts to try for each engine, the best of which it runs at; by default 1, 2, 4 ... up to the machine's cores.
    """

    prompt_tokens: Positive = 16
    new_tokens: Positive = 64
    batch_sizes: tuple[Positive, ...] = (1, 8)
    rounds: Positive = 5
    windows: Positive = 60
    window_tokens: SequenceLength = 256
    threads: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None


class ConstraintsSpec(Spec):
    """Bounds that the winner keeps with its confidence bound, not its point estimate. Quality loss: relative, in bits per byte."""

    max_quality_loss: float | None = None
    min_speedup: float | None = None
    max_size_bytes: Positive | None = None
    max_p95_latency_s: float | None = None
    max_peak_memory_bytes: Positive | None = None


class DecideSpec(Spec):
    """How the winner is chosen among the measured variants."""

    constraints: ConstraintsSpec
    objective: str


class PromoteSpec(Spec):
    """The registered model, and how far the winner goes by itself: nowhere, 'staging' or 'production'."""

    model: str
    stage: Literal["none", "staging", "production"] = "production"


class Recipe(Spec):
    """A whole optimization.

    task: text from a prefix (Llama, Qwen ...), text from a text (T5, mBART, Marian ...), or filling in masks (BERT, RoBERTa ...).
    """

    name: Name
    checkpoint: CheckpointSpec
    task: Task = "text-generation"
    data: DataSpec
    stages: StagesSpec = StagesSpec()
    variants: tuple[VariantsSpec, ...] | None = None
    workload: WorkloadSpec = WorkloadSpec()
    constraints: ConstraintsSpec = ConstraintsSpec()
    objective: str = Field(default="speedup@1", pattern=r"^(speedup@\d+|size|quality)$")
    promote: PromoteSpec
    seed: int = 0

    @model_validator(mode="after")
    def _trains_what_it_wants(self) -> Recipe:
        if self.checkpoint.train is not None and self.task != "text-generation":
            raise ValueError(f"checkpoint.train makes a Llama, which is no model for {self.task}; give checkpoint.source")
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> Recipe:
        names = [name for stage in type(self.stages).model_fields for name in getattr(self.stages, stage)]
        reserved = {"none", "baseline", "checkpoint", "gate", "text"}
        for name in names:
            if names.count(name) > 1 or name in reserved:
                why = "is reserved" if name in reserved else "stands twice"
                raise ValueError(f"the name '{name}' {why} among the stages' alternatives; variants need distinct names")
        return self


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are 'a.b=c' with c in YAML. Raises RecipeError with one line."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    for override in overrides:
        _set(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path.name}: {_explain(error, tree)}") from error


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one 'a.b=c'."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set wants KEY.KEY=VALUE, got '{override}'")
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: '{key}' holds a value, not keys")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {one_line(error)}") from error


def _explain(error: ValidationError, tree: Any) -> str:
    """The first problem of a validation error, in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] != "extra_forbidden":
        return f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}{more}"
    known = _known_keys(first["loc"][:-1])
    return f"unknown key '{where}'; {nearest(str(first['loc'][-1]), sorted(known))}{more}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that stands at `location` in a recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(model, type) and issubclass(model, Spec) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        model = _spec_inside(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Spec) else []


def _spec_inside(annotation: Any) -> Any:
    """The Spec class that an annotation such as `dict[Name, X]`, `X | None` or `tuple[X, ...]` holds."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_inside(argument)
        if found is not None:
            return found
    return None
