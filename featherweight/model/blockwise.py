"""Calibration text carried through a model block by block, so that each block can be changed given what it will really read.

Before block n is visited every block before it has been, and its inputs are what those changed blocks put out, as in SparseGPT
and GPTQ. Nothing is traced: the model's own forward runs up to the visited block and stops, with the blocks before it
answering from memory. So it works for every model type whose blocks are known, masks and position biases included. Each block
is computed twice (once seen, once changed), and beside the model only the outputs of one block per stack are held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import Block, attention_options, auto_class, blocks, stacks
from featherweight.model.heads import forwarded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

BATCH = 8
"""Calibration blocks per forward pass."""

Inputs = Mapping[str, Any]
See = Callable[["nn.Linear", "Tensor"], None]


@dataclass
class Visit:
    """One block, everything before it being done. `run` sends the calibration text through the block."""

    block: Block
    run: Run

    def watch(self, see: See) -> None:
        """Run the calibration text through the block: see(linear, inputs [tokens, channels]) per batch."""

        def hook(module: Any, inputs: Any) -> None:
            see(module, inputs[0].flatten(0, -2))

        with ExitStack() as hooks:
            for linear in linears(self.block).values():
                hooks.callback(linear.register_forward_pre_hook(hook).remove)
            self.run()


def linears(block: Block) -> dict[str, nn.Linear]:
    """The matrices of a block by their names in the model."""
    from torch import nn

    found = block.module.named_modules()
    return {f"{block.name}.{name}": module for name, module in found if isinstance(module, nn.Linear)}


def matrices(config: PreTrainedConfig) -> dict[str, nn.Linear]:
    """The matrices of all blocks of a model of `config`, by name; their weights take no memory and have no values."""
    import torch

    with torch.device("meta"):
        model = auto_class(config).from_config(config, **attention_options(config))
    return {name: linear for block in blocks(model) for name, linear in linears(block).items()}


def visits(model: PreTrainedModel, batches: Sequence[Inputs]) -> Iterator[Visit]:
    """Every block of `model` in turn, on batches of unpadded inputs of its forward; change a block while it is yours.

    The model is in eval mode meanwhile, and no gradients are kept.
    """
    import torch

    done: list[tuple[list[Any], tuple[Block, ...]]] = []
    with _evaluating(model), torch.no_grad():
        for stack in stacks(model):
            outputs: list[Any] = [None] * len(batches)
            for count, block in enumerate(stack.blocks):
                run = Run(model, batches, block, [*done, (outputs, stack.blocks[:count])])
                yield Visit(block, run)
                outputs[:] = run.outputs()
            done.append((outputs, stack.blocks))


@dataclass(frozen=True)
class Run:
    """The passes that end behind `block`; `known` holds outputs by batch, and the blocks that answer with them."""

    model: PreTrainedModel
    batches: Sequence[Inputs]
    block: Block
    known: list[tuple[list[Any], tuple[Block, ...]]]

    def __call__(self) -> None:
        """Run all batches, for what is hooked to the block."""
        deque(self.outputs(), maxlen=0)

    def outputs(self) -> Iterator[Any]:
        """What the block puts out for each batch."""
        return (self.forward(number) for number in range(len(self.batches)))

    def forward(self, number: int) -> Any:
        """What it puts out for one batch."""
        with ExitStack() as replaced:
            for outputs, blocks in self.known:
                for block in blocks:
                    replaced.enter_context(_answering(block.module, outputs[number]))
            replaced.callback(self.block.module.register_forward_hook(_stop).remove)
            try:
                forwarded(self.model, moved(self.batches[number], self.model.device))
            except _Stopped as stopped:
                return stopped.output
        raise AssertionError(f"{self.block.name} was not called in the model's forward")


def moved(inputs: Inputs, device: Any) -> dict[str, Any]:
    """The inputs on the device that a model computes on."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}


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
