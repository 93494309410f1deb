"""The teacher's answers to blocks of text: computed anew, or computed once and kept as their likeliest tokens.

A block that is read in several epochs gets the same answer every time. Its logits would fill gigabytes; 64 tokens a position and
the mass of all others tell nearly as much in 400 bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featherweight.distillation.losses import TopK, top_k
from featherweight.distillation.spec import DistillSpec
from featherweight.model.architecture import task_of
from featherweight.model.heads import answers
from featherweight.spec import HEADED
from featherweight.text.model_inputs import inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Answers = Callable[["Tensor"], "Tensor | TopK"]
MEMORY_SHARE = 0.25
"""Share of the free memory that kept answers may take; beyond it they go to a temporary file."""
DISK_SHARE = 0.5
"""Share of the free disk that they may take; beyond it they are computed anew each time."""


def answers_of(teacher: PreTrainedModel, blocks: Tensor, spec: DistillSpec) -> Answers:
    """Block ids [batch, block] -> the teacher's logits [batch * positions, vocabulary], or what is kept of them.

    Whether they are cut to their likeliest tokens depends on the spec and the number of blocks only, never on this machine's
    memory, so that a recipe gives the same student everywhere; where they are kept meanwhile does.
    """

    def whole(ids: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return answers(teacher, inputs_and_labels(teacher.config, ids)[0]).flatten(0, 1)

    if task_of(teacher.config) in HEADED or not cut_to_top_k(spec, len(blocks)):
        return whole
    positions = inputs_and_labels(teacher.config, blocks[:1])[1].shape[1]
    vocabulary = teacher.config.get_text_config().vocab_size
    k = min(spec.top_k, vocabulary)
    return Kept(whole, blocks, positions, k, spec.temperature, tail=k < vocabulary)


def cut_to_top_k(spec: DistillSpec, blocks: int) -> bool:
    """Whether the teacher's answers are kept: by 'auto' where a block is read more than once and nothing else of it is needed."""
    if spec.teacher_cache != "auto":
        return spec.teacher_cache == "top_k"
    return spec.kl_weight > 0 and not spec.hidden_weight and not spec.attention_weight and spec.steps * spec.batch > blocks


class Kept:
    """Answers as int32 ids, float16 log-probabilities and the float32 log-mass of the tail, filled in as blocks are asked for."""

    def __init__(self, whole: Callable[[Tensor], Tensor], blocks: Tensor, positions: int, k: int, temperature: float, tail: bool):
        import numpy

        self.whole, self.k, self.temperature, self.tail = whole, k, temperature, tail
        self.rows = {row.numpy().tobytes(): place for place, row in enumerate(blocks.cpu())}
        self.known = numpy.zeros(len(blocks), dtype=bool)
        shapes = {"int32": (positions, k), "float16": (positions, k), "float32": (positions,)}
        place = place_for(len(blocks) * positions * (6 * k + 4))
        self.kept = [_array(place, kind, (len(blocks), *shape)) for kind, shape in shapes.items()] if place else None

    def __call__(self, ids: Tensor) -> TopK:
        if self.kept is None:
            return self._read(self._compute(ids), ids.device)
        places = [self.rows[row.numpy().tobytes()] for row in ids.cpu()]
        new = [row for row, place in enumerate(places) if not self.known[place]]
        if new:
            target = [places[row] for row in new]
            for array, found in zip(self.kept, self._compute(ids[new]), strict=True):
                array[target] = found
            self.known[target] = True
        return self._read(tuple(array[places] for array in self.kept), ids.device)

    def _compute(self, ids: Tensor) -> tuple[Any, Any, Any]:
        """What is stored of the answers to `ids`: arrays [blocks, positions, k] twice, and [blocks, positions]."""
        import numpy

        found = top_k(self.whole(ids), self.temperature, self.k)
        log_p = found.log_p.float().view(len(ids), -1, found.log_p.shape[1]).cpu().numpy()
        rest = log_p[..., -1] if self.tail else numpy.zeros(log_p.shape[:2], numpy.float32)
        return found.ids.int().view(len(ids), -1, self.k).cpu().numpy(), log_p[..., : self.k].astype(numpy.float16), rest

    def _read(self, stored: tuple[Any, Any, Any], device: Any) -> TopK:
        """Stored answers as tensors, normalised again after the rounding to float16."""
        import torch

        ids, kept, rest = (torch.from_numpy(array).flatten(0, 1).to(device) for array in stored)
        log_p = torch.cat([kept.float(), rest[:, None]], 1) if self.tail else kept.float()
        return TopK(ids.long(), log_p - log_p.logsumexp(-1, keepdim=True))


def _array(place: str, kind: str, shape: tuple[int, ...]) -> Any:
    """An array in memory, or in a file that is gone with it."""
    import numpy

    if place == "memory":
        return numpy.empty(shape, kind)
    with tempfile.TemporaryFile() as file:
        return numpy.memmap(file, kind, "w+", shape=shape)


def place_for(size_bytes: int) -> str | None:
    """Where this machine has room for so many bytes: 'memory', 'disk' or None."""
    import psutil

    if size_bytes <= MEMORY_SHARE * psutil.virtual_memory().available:
        return "memory"
    return "disk" if size_bytes <= DISK_SHARE * psutil.disk_usage(tempfile.gettempdir()).free else None
