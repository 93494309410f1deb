"""distill: a smaller student, trained to say what the teacher says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import opening, saving
from featherweight.distillation.losses import answered
from featherweight.distillation.matching import Matcher, Pair
from featherweight.distillation.spec import DistillSpec
from featherweight.distillation.students import make_student, matched_layers, require_same_tokens, require_vectors_as_wide
from featherweight.distillation.teacher_answers import Answers, answers_of
from featherweight.errors import RecipeError
from featherweight.model.architecture import task_of
from featherweight.model.heads import answers as answers_to
from featherweight.model.heads import read
from featherweight.model.sparsity import Sparsity, Zeros
from featherweight.progress import Metrics, Progress
from featherweight.system import device
from featherweight.text.model_inputs import example_blocks, inputs_and_labels, real_positions
from featherweight.training import loop
from featherweight.training.data_parallel import launched, leads
from featherweight.training.launch import run_in_processes
from featherweight.training.losses import mean_loss, token_loss
from featherweight.training.plan import TrainingPlan
from featherweight.training.spec import sharded_zeros_refusal
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

COMPARED = 32
"""Blocks of training text on which the teacher and the finished student are compared."""


@stage("distill", version="2", libraries=("torch", "transformers"))
def distill(
    spec: DistillSpec,
    *,
    checkpoint: Path,
    text: Path,
    out: Path,
    calibration: Path | None = None,
    student: Path | None = None,
    generated: Path | None = None,
    scratch: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Distil `checkpoint` into a student: of its own layers, or the checkpoint `student` where the spec wants one.

    calibration: the text that block influence is measured on. generated: what the teacher wrote, for sequence-level distillation.
    scratch: where a killed training resumes from.
    Metrics: `loss_first` and `loss_last` (the mixed loss), `teacher_loss` and `student_loss` (cross-entropy in nats per
    token, on a sample of the text), `parameters_teacher`, `parameters`, `tokens`, `tokens_per_s`; `zero_share` of a sparse
    student, or one of a sparse teacher's layers, whose zeros stay. Raises RecipeError for
    layers that the teacher does not have, CheckpointError for a student with another tokenizer, StageError for an
    architecture it cannot cut and on divergence.
    """
    if spec.processes > 1 and not launched():
        folders = {"checkpoint": checkpoint, "text": text, "calibration": calibration, "student": student, "generated": generated}
        folders |= {"scratch": scratch, "out": out}
        return run_in_processes(f"{__name__}:distill", spec, folders, seed, spec.processes, progress)
    config = opening.load_config(checkpoint)
    pairs = check(spec, checkpoint, config, student, text)
    blocks = training_blocks(spec, checkpoint, config, text, generated, seed)
    teacher = opening.load_model(checkpoint)
    pupil = make_student(spec, teacher, checkpoint, student, calibration, seed)
    sparsity = sparsity_of(pupil, checkpoint, student)
    if sparsity and spec.sharded:
        raise RecipeError(sharded_zeros_refusal("distill"))
    zeros = Zeros.of(pupil, sparsity)
    with zeros.held(pupil):
        run = train_student(spec, teacher, pupil, blocks, pairs, scratch, seed, progress)
    if not leads():
        return run
    saving.save_model(pupil, out, student or checkpoint)
    if sparsity:
        sparsity.write(out)
    compared = example_blocks(checkpoint, config, text, spec.sequence, limit=COMPARED, seed=seed)
    return run | {
        "teacher_loss": mean_loss(teacher, compared),
        "student_loss": mean_loss(device.place(pupil), compared),
        "parameters_teacher": opening.parameters(teacher),
        "parameters": opening.parameters(pupil),
        **zeros.metrics(),
    }


def check(spec: DistillSpec, checkpoint: Path, config: PreTrainedConfig, student: Path | None, text: Path) -> tuple[Pair, ...]:
    """Refuse what cannot work before any weight is read; the pairs of layers that are to be matched."""
    opening.require_context(config, spec.sequence, "distill")
    if student is None and spec.layers is None:
        raise RecipeError("distill: a student that is given or pruned is an input of the stage; give its folder")
    if student is not None:
        require_same_tokens(checkpoint, student, text)
        own = opening.load_config(student)
        opening.require_context(own, spec.sequence, "distill")
        require_vectors_as_wide(config, own)
    return matched_layers(spec, config, opening.load_config(student) if student else None)


def training_blocks(
    spec: DistillSpec, checkpoint: Path, config: PreTrainedConfig, text: Path, generated: Path | None, seed: int
) -> Tensor:
    """Token ids to train on: of the text, and for a share of them of what the teacher wrote, repeated as often as that needs."""
    import torch

    limit = spec.steps * spec.batch
    share = spec.sequence_level.share if spec.sequence_level else 0.0
    read = []
    if share < 1:
        read.append(example_blocks(checkpoint, config, text, spec.sequence, limit=max(1, round((1 - share) * limit)), seed=seed))
    if generated is not None and share:
        wanted = round(share / (1 - share) * len(read[0])) if read else limit
        written = example_blocks(checkpoint, config, generated, spec.sequence, limit=wanted, seed=seed)
        read.append(written.repeat(-(-wanted // len(written)), 1)[:wanted] if share < 1 else written)
    return torch.cat(read)


def sparsity_of(pupil: PreTrainedModel, checkpoint: Path, student: Path | None) -> Sparsity | None:
    """How the student is sparse before training: as its own checkpoint, or as those layers of the teacher that it is made of."""
    if student is not None:
        return Sparsity.read(student)
    whole = Sparsity.read(checkpoint)
    return whole and whole.of_layers(pupil)


def train_student(
    spec: DistillSpec,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    blocks: Tensor,
    pairs: tuple[Pair, ...],
    scratch: Path | None,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Train `student` in place, and the projections of its hidden states with it; the metrics of the loop."""
    import torch

    teacher.eval().requires_grad_(False)
    matcher = Matcher(teacher, student, pairs, spec, seed) if pairs else None
    trained: Any = torch.nn.ModuleList([student, *([matcher.projections] if matcher else [])])
    trained.config = student.config  # the loop asks for it
    loss_fn: loop.LossFunction
    if matcher:
        loss_fn = matching_loss(teacher, student, matcher, spec)
    elif spec.kl_weight == 0:
        loss_fn = partial(token_loss, student)
    else:
        loss_fn = answer_loss(student, answers_of(teacher, blocks, spec), spec)
    plan = TrainingPlan(
        spec.steps, spec.batch, spec.learning_rate, weight_decay=0.01, scratch=scratch, seed=seed, sharded=spec.sharded
    )
    return loop.timed_loop(trained, blocks, plan, loss_fn=loss_fn, progress=progress)


def answer_loss(student: PreTrainedModel, answers: Answers, spec: DistillSpec) -> loop.LossFunction:
    """The loss on what the teacher answers: block ids [batch, block] -> scalar."""

    def loss(ids: Tensor) -> Tensor:
        inputs, labels = inputs_and_labels(student.config, ids)
        target = answers(ids)
        said = answers_to(student, inputs)
        return answered(task_of(student.config), said, target, labels, spec.temperature, spec.kl_weight, spec.divergence)

    return loss


def matching_loss(teacher: PreTrainedModel, student: PreTrainedModel, matcher: Matcher, spec: DistillSpec) -> loop.LossFunction:
    """The loss on answers, hidden states and attention maps: block ids [batch, block] -> scalar."""
    import torch

    def loss(ids: Tensor) -> Tensor:
        inputs, labels = inputs_and_labels(student.config, ids)
        with torch.no_grad():
            of_teacher = matcher.run(teacher, inputs, teacher=True)
        of_student = matcher.run(student, inputs, teacher=False)
        said, target = (read(student.config, output, inputs) for output in (of_student[0], of_teacher[0]))
        task, target = task_of(student.config), target.flatten(0, 1)
        loss = answered(task, said, target, labels, spec.temperature, spec.kl_weight, spec.divergence)
        return loss + matcher.loss(of_student, of_teacher, real_positions(inputs, labels))

    return loss
