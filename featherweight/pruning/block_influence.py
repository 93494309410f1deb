"""Block influence: how much each layer of a model changes what it is given.

Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import Role, stacks
from featherweight.model.heads import forwarded
from featherweight.text.model_inputs import inputs_and_labels, real_positions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BATCH = 8
"""Blocks of text per forward pass."""


def block_influence(model: PreTrainedModel, examples: Tensor) -> dict[Role, list[float]]:
    """1 - the mean cosine of the hidden states before and behind each layer, by stack; padding does not count.

    examples: token ids as featherweight.text.model_inputs makes them, int64 [blocks, length].
    """
    import torch

    found = stacks(model)
    sums = {stack.role: torch.zeros(len(stack.blocks), dtype=torch.float64) for stack in found}
    counts = dict.fromkeys(sums, 0)
    for part in examples.split(BATCH):
        inputs, labels = inputs_and_labels(model.config, part.to(model.device))
        real = real_positions(inputs, labels)
        for stack in found:
            with torch.inference_mode(), _cosines([block.module for block in stack.blocks]) as cosines:
                forwarded(model, inputs)
            sums[stack.role] += torch.stack([cosine[real[stack.role]].double().sum().cpu() for cosine in cosines])
            counts[stack.role] += int(real[stack.role].sum())
    return {role: (1 - total / counts[role]).tolist() for role, total in sums.items()}


@contextmanager
def _cosines(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, a forward pass leaves each module's cosine of what it is given and gives, [batch, positions]."""
    import torch

    found: list[Tensor] = []

    def compare(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        found.append(torch.cosine_similarity(before, output[0] if isinstance(output, tuple) else output, -1))

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def most_influential(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """The places of the `count` highest values, rising."""
    return tuple(sorted(sorted(range(len(influence)), key=lambda place: -influence[place])[:count]))
