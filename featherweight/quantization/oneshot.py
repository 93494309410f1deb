"""llm-compressor's one-shot calibration, kept to itself: no bars, no log lines, no files, no session left behind.

Decoders go through its own sequential pipeline, which traces the model. Its tracer hides the encoder layers of every BART (they
stand under an `if` on a local variable) and its statistics count padding, so encoders and encoder-decoders go through a pipeline
of ours: block by block as well, given what the calibrated blocks before put out, on inputs without padding. So do decoders whose
weights stay in their files: those of one block are in memory while it is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.streamed import held, is_streamed
from featherweight.errors import StageError, one_line
from featherweight.grid import Grid
from featherweight.model.architecture import family_of
from featherweight.model.blockwise import BATCH, Visit, visits
from featherweight.quantization import patches
from featherweight.text.model_inputs import unpadded_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

LIBRARIES = ("llmcompressor", "compressed-tensors")
"""Distributions whose versions shape a calibration."""


def run(model: PreTrainedModel, modifiers: Callable[[], list[Any]], blocks: Tensor) -> list[Any]:
    """Calibrate `model` in place with `blocks` (see featherweight.text.model_inputs), layer by layer.

    modifiers: makes llm-compressor's modifiers; they are returned once they have run. Raises StageError where the library fails.
    """
    try:
        with patches.quiet(), patches.eager_gptq(), patches.device_in_use():
            return _oneshot(model, modifiers(), blocks)
    except Exception as error:  # the library's own checks, tracing and linear algebra each raise in their way
        raise StageError(f"llm-compressor could not calibrate this checkpoint: {one_line(error)}") from error


def weights_scheme(grid: Grid) -> dict[str, Any]:
    """llm-compressor's description of weights on `grid`. 127 steps on either side are 8 bits wide there, 63 are 7."""
    return {
        "num_bits": (grid.qmax + 1).bit_length() if grid.kind == "int" else grid.bits,
        "type": grid.kind,
        "symmetric": True,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
    }


def _oneshot(model: PreTrainedModel, modifiers: list[Any], blocks: Tensor) -> list[Any]:
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from torch.utils.data import DataLoader

    batches: Any = unpadded_inputs(model.config, blocks, BATCH)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    pipeline = "sequential" if family_of(model.config) == "causal" and not is_streamed(model) else _blockwise()
    try:
        oneshot(model=model, recipe=modifiers, dataset=loader, pipeline=pipeline, num_calibration_samples=len(blocks))
    finally:
        reset_session()
    return modifiers


@cache
def _blockwise() -> str:
    """Register a pipeline that visits one block after another, and return its name."""
    from llmcompressor.core import LifecycleCallbacks
    from llmcompressor.pipelines.registry import CalibrationPipeline
    from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

    @CalibrationPipeline.register("blockwise")
    class Blockwise(CalibrationPipeline):
        @staticmethod
        def __call__(model: Any, dataloader: Any, dataset_args: Any) -> None:
            LifecycleCallbacks.calibration_start()
            with calibration_forward_context(model), DisableQuantization(model), ExitStack() as here:
                for visit in _unwatched(visits(model, list(dataloader))):
                    here.close()  # by now the block before has put out what it will
                    here.enter_context(held(visit.block.module))
                    visit.run()
                    LifecycleCallbacks.sequential_epoch_end(list(visit.block.module.modules()))
            LifecycleCallbacks.calibration_end()

    return "blockwise"


def _unwatched(visits: Iterator[Visit]) -> Iterator[Visit]:
    """The same visits; the passes between them, through blocks that are done, are not shown to the modifiers."""
    from llmcompressor.modifiers.utils.hooks import HooksMixin

    def proceed() -> Visit | None:
        with HooksMixin.disable_hooks():
            return next(visits, None)

    return iter(proceed, None)
