"""Calibration text carried through a model block by block, so that each block can be changed given what it will really read.

Before block n is visited every block before it has been, and its inputs are what those changed blocks put out, as in SparseGPT
and GPTQ. Nothing is traced: the model's own forward runs up to the visited block and stops, with the blocks before it
answering from memory. So it works for every model type whose blocks are known, masks and position biases included. Each block
is computed twice (once seen, once changed), and beside the model only the outputs of one block per stack are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.architecture import Block, Role, stacks
from featherweight.examples import IGNORED, inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BATCH = 8
"""Calibration blocks per forward pass."""

See = Callable[["nn.Linear", "Tensor"], None]


@dataclass
class Visit:
    """One block, everything before it being done."""

    block: Block
    _pass: Callable[[See], None]

    def watch(self, see: See) -> None:
        """Run the calibration text through the block: see(linear, inputs [tokens, channels]) per batch, padding left out."""
        self._pass(see)


def linears(block: Block) -> dict[str, nn.Linear]:
    """The matrices of a block by their names in the model."""
    from torch import nn

    found = block.module.named_modules()
    return {f"{block.name}.{name}": module for name, module in found if isinstance(module, nn.Linear)}


def visits(model: PreTrainedModel, examples: Tensor, batch: int = BATCH) -> Iterator[Visit]:
    """Every block of `model` in turn, on `examples` (see featherweight.examples); change a block while it is yours.

    The model is in eval mode meanwhile, and no gradients are kept.
    """
    import torch

    parts = examples.split(batch)
    done: list[tuple[list[Any], tuple[Block, ...]]] = []
    with _evaluating(model), torch.no_grad():
        for stack in stacks(model):
            outputs: list[Any] = [None] * len(parts)
            for count, block in enumerate(stack.blocks):
                known = [*done, (outputs, stack.blocks[:count])]
                run = _Run(model, parts, stack.role, block, known)
                yield Visit(block, run.watched)
                outputs[:] = run.outputs()
            done.append((outputs, stack.blocks))


@dataclass(frozen=True)
class _Run:
    """The passes that end behind `block`; `known` holds outputs by batch, and the blocks that answer with them."""

    model: PreTrainedModel
    parts: tuple[Tensor, ...]
    role: Role
    block: Block
    known: list[tuple[list[Any], tuple[Block, ...]]]

    def watched(self, see: See) -> None:
        """Show the inputs of every matrix of the block, batch by batch."""
        for number, part in enumerate(self.parts):
            with ExitStack() as hooks:
                for linear in linears(self.block).values():
                    counted = self._counted(linear, part)

                    def hook(module: Any, inputs: Any, counted: Tensor | None = counted) -> None:
                        see(module, inputs[0][counted] if counted is not None else inputs[0].flatten(0, -2))

                    hooks.callback(linear.register_forward_pre_hook(hook).remove)
                self._forward(number, part)

    def outputs(self) -> Iterator[Any]:
        """What the block puts out for each batch."""
        return (self._forward(number, part) for number, part in enumerate(self.parts))

    def _forward(self, number: int, part: Tensor) -> Any:
        device = next(self.model.parameters()).device
        inputs, _ = inputs_and_labels(self.model.config, part.to(device))
        with ExitStack() as replaced:
            for outputs, blocks in self.known:
                for block in blocks:
                    replaced.enter_context(_answering(block.module, outputs[number]))
            replaced.callback(self.block.module.register_forward_hook(_stop).remove)
            try:
                self.model(**inputs)
            except _Stopped as stopped:
                return stopped.output
        raise AssertionError(f"{self.block.name} was not called in the model's forward")

    def _counted(self, linear: nn.Linear, part: Tensor) -> Tensor | None:
        """Which positions of the linear's input are text, bool [batch, positions]; None for all of them."""
        inputs, labels = inputs_and_labels(self.model.config, part.to(linear.weight.device))
        source = inputs.get("attention_mask")
        if source is None:
            return None
        across = [matrix for attention in self.block.attentions[1:] for matrix in (attention.k, attention.v)]
        return source.bool() if self.role == "encoder" or any(linear is matrix for matrix in across) else labels != IGNORED


class _Stopped(Exception):
    def __init__(self, output: Any) -> None:
        self.output = output


def _stop(module: Any, inputs: Any, output: Any) -> None:
    raise _Stopped(output)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """`module` gives `output`, whatever it is called with."""
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
