"""finetune: recovery training, of all weights or of LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint import opening, saving
from featherweight.checkpoint.streamed import open_to_train
from featherweight.errors import RecipeError
from featherweight.model.sparsity import Sparsity, Zeros
from featherweight.progress import Metrics, Progress
from featherweight.text.labels import require_labels
from featherweight.text.model_inputs import example_blocks
from featherweight.training import loop, lora
from featherweight.training.data_parallel import launched, leads
from featherweight.training.launch import run_in_processes
from featherweight.training.plan import HeldOut, TrainingPlan
from featherweight.training.spec import FinetuneSpec, sharded_zeros_refusal
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HELD_OUT = 32
"""Blocks of held-out text that the loss is measured on."""


@stage("finetune", version="2", libraries=("torch", "transformers", "peft", "accelerate"))
def finetune(
    spec: FinetuneSpec,
    *,
    checkpoint: Path,
    text: Path,
    out: Path,
    calibration: Path | None = None,
    scratch: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Train `checkpoint` on `text`: AdamW, linear warm-up, cosine decay; documents packed end to end where the family allows.

    calibration: the held-out text for `patience` and `evaluate_every`. scratch: where a killed training resumes from.
    Metrics: `loss_first` and `loss_last` (nats per token, means over the first and last tenth of the steps), `steps`, `tokens`,
    `tokens_per_s`, `parameters`, `parameters_trained`; with held-out text `held_out_first`, `held_out_loss` and `best_step`;
    `zero_share` of a sparse checkpoint, whose zeros stay.
    Raises DivergenceError, RecipeError for what the model cannot do, DataError where a text is too short.
    """
    if spec.processes > 1 and not launched():
        folders = {"checkpoint": checkpoint, "text": text, "calibration": calibration, "scratch": scratch, "out": out}
        return run_in_processes(f"{__name__}:finetune", spec, folders, seed, spec.processes, progress)
    config = opening.load_config(checkpoint)
    opening.require_context(config, spec.sequence, "finetune")
    require_labels(config, text)
    blocks = example_blocks(checkpoint, config, text, spec.sequence, limit=spec.steps * spec.batch, seed=seed)
    held_out = held_out_text(spec, checkpoint, config, calibration)
    model = open_to_train(checkpoint, spec.sharded)
    sparsity = Sparsity.read(checkpoint)
    if sparsity and spec.sharded:
        raise RecipeError(sharded_zeros_refusal("finetune"))
    zeros = Zeros.of(model, sparsity)
    adapted = lora.attach(model, spec.lora, seed) if spec.lora else None
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with zeros.held(model):
        run = loop.timed_loop(model, blocks, _plan(spec, held_out, scratch, seed), progress=progress)
    if adapted is not None:
        model = lora.merge(adapted)
    if leads():
        zeros.restore(model)
        saving.save_model(model, out, checkpoint)
        if sparsity:
            sparsity.write(out)
    return run | {"parameters": opening.parameters(model), "parameters_trained": trained} | zeros.metrics()


def _plan(spec: FinetuneSpec, held_out: HeldOut | None, scratch: Path | None, seed: int) -> TrainingPlan:
    return TrainingPlan(
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        warmup=spec.warmup,
        weight_decay=0.01,
        accumulate=spec.accumulate,
        held_out=held_out,
        scratch=scratch,
        save_every_s=spec.save_every_s,
        seed=seed,
        sharded=spec.sharded,
    )


def held_out_text(spec: FinetuneSpec, checkpoint: Path, config: PreTrainedConfig, text: Path | None) -> HeldOut | None:
    """What the recipe wants measured while training, None for nothing. Raises RecipeError where it has no text for it."""
    if spec.patience is None and spec.evaluate_every is None:
        return None
    if text is None:
        raise RecipeError("finetune.patience and evaluate_every need held-out text: give the stage a calibration input")
    blocks = example_blocks(checkpoint, config, text, spec.sequence, limit=HELD_OUT)
    return HeldOut(blocks, spec.evaluate_every or max(1, spec.steps // 10), spec.patience)
