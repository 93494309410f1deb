"""train: a byte-level BPE tokenizer and a small Llama, from nothing but text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import opening, saving
from featherweight.errors import DataError, RecipeError
from featherweight.progress import Metrics, Progress
from featherweight.system import device
from featherweight.text.documents import read_documents
from featherweight.text.tokens import token_blocks
from featherweight.training import loop
from featherweight.training.data_parallel import launched, leads
from featherweight.training.launch import run_in_processes
from featherweight.training.plan import TrainingPlan
from featherweight.training.spec import TrainSpec
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@stage("train", version="1", libraries=("torch", "transformers", "tokenizers"))
def train(
    spec: TrainSpec,
    *,
    text: Path,
    out: Path,
    scratch: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Train a tokenizer and a Llama with tied embeddings on the documents of `text`.

    scratch: where a killed training resumes from.
    Metrics: `loss_first` and `loss_last` (nats per token, means over a tenth of the steps), `steps`, `tokens`, `tokens_per_s`,
    `parameters`. Raises RecipeError for sizes that do not fit one another, StageError on divergence.
    """
    if reason := spec.refusal():
        raise RecipeError(reason)
    if spec.processes > 1 and not launched():
        folders = {"text": text, "scratch": scratch, "out": out}
        return run_in_processes(f"{__name__}:train", spec, folders, seed, spec.processes, progress)
    progress.note("training the tokenizer")
    tokenizer = train_tokenizer(text, spec)
    model = new_model(spec, tokenizer, seed)
    blocks = token_blocks(text, tokenizer, spec.context, limit=spec.steps * spec.batch, seed=seed)
    plan = TrainingPlan(
        spec.steps, spec.batch, spec.learning_rate, optimizer="muon", scratch=scratch, seed=seed, sharded=spec.sharded
    )
    run = loop.timed_loop(model, blocks, plan, progress=progress)
    if leads():
        saving.save_model(model, out)
        saving.save_tokenizer(tokenizer, out)
    return run | {"parameters": opening.parameters(model)}


def train_tokenizer(text: Path, spec: TrainSpec) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the first `tokenizer_bytes` of text (characters): every string round-trips, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(text, spec.tokenizer_bytes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=spec.context,
        clean_up_tokenization_spaces=False,
    )


def _head(text: Path, limit: int) -> Iterator[str]:
    """Documents until `limit` characters have been read; the last one is cut. Raises DataError where there is no text."""
    left = limit
    for document in read_documents(text):
        if left <= 0:
            break
        yield document.text[:left]
        left -= len(document.text)
    if left == limit:
        raise DataError(f"the training text in {text} is empty; give text to train the tokenizer on")


def new_model(spec: TrainSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama, tied embeddings, float32."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(spec, tokenizer))
        _damp_residuals(model, spec.layers)
    return device.place(model)


def _config(spec: TrainSpec, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    ends: Any = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    return LlamaConfig(**spec.llama | ends | {"vocab_size": len(tokenizer), "initializer_range": 0.02})


def _damp_residuals(model: LlamaForCausalLM, layers: int) -> None:
    """Scale what is added to the residual stream by 1/sqrt(2 layers), so that its variance does not grow with depth (GPT-2)."""
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.div_(math.sqrt(2 * layers))
            layer.mlp.down_proj.weight.div_(math.sqrt(2 * layers))
