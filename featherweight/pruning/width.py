"""Hidden-width pruning: the residual stream keeps its most important channels, in every layer the same.

Muralidharan et al.: "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024. Embeddings, norms,
the head, and the inputs and outputs of every block are cut; heads keep their number and their width. As in the paper the cut is
plain: a norm's mean runs over fewer channels afterwards, which the recovery training has to take up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError, StageError
from featherweight.model import surgery
from featherweight.model.architecture import blocks, dimensions
from featherweight.model.facts import CheckpointFacts
from featherweight.model.heads import forwarded
from featherweight.model.parent import Parent
from featherweight.pruning.counts import kept_channels
from featherweight.pruning.importance import BATCH, Group, Member, importance, keep_best
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import Criterion, PruneSpec
from featherweight.spec import HEADED, ModelSize, Positive, Share
from featherweight.text.model_inputs import inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


class WidthSpec(PruneSpec):
    """The hidden size, to `hidden` or by `ratio`; criterion activation is Minitron's."""

    method: Literal["width"] = "width"
    criterion: Literal[Criterion, "activation"] = "param_first"
    ratio: Share = 0.25
    hidden: Positive | None = None

    @property
    def unread(self) -> dict[str, str]:
        return {} if self.hidden is None else {"ratio": "beside hidden"}

    def left(self, size: ModelSize) -> ModelSize:
        """By `ratio`: of a `hidden` given, the size does not tell what share it is."""
        return size.kept(hidden=1 - self.ratio) if self.hidden is None else size


def prune(given: PruningInput[WidthSpec]) -> Pruned:
    """Cut the hidden size to `spec.hidden`, or by `spec.ratio`. A metric of its own: `hidden_size`.

    Raises StageError where the hidden size follows from the heads, RecipeError for a size out of range.
    """
    size = target_size(given.spec, given.config)
    before = opening.parameters(given.model)
    if given.spec.criterion == "activation":
        score, loss = activations(given.model, given.blocks), given.loss()
    else:
        (score,), loss = importance(
            given.model, [residual_group(given.model)], given.spec.criterion, given.blocks, given.seed, given.progress
        )
    cut(given.model, keep_best(score, size))
    config = surgery.resized_config(given.config, _sizes(given.config, size))
    return Pruned(surgery.with_config(given.model, config), before, loss, {"hidden_size": size})


def target_size(spec: WidthSpec, config: PreTrainedConfig) -> int:
    """The hidden size to be left, checked by the config alone."""
    if not all(size.free_heads for size in dimensions(config)):
        raise StageError(
            f"prune.method width: the hidden size of a {config.model_type} is its heads times their width, and its config cannot "
            "say otherwise; leave the stage out for it"
        )
    whole = config.hidden_size
    size = spec.hidden or kept_channels(whole, spec.ratio)
    if size >= whole:
        asked = f"prune.hidden {spec.hidden}" if spec.hidden else f"prune.ratio {spec.ratio}"
        raise RecipeError(f"{asked} removes nothing from the hidden size of {whole}; give a smaller size or a higher ratio")
    return size


def _sizes(config: PreTrainedConfig, size: int) -> dict[str, int]:
    """The config's keys that change; a head's width is said, so that it does not follow from the hidden size."""
    if "d_model" in config.to_dict():
        return {"d_model": size}
    return {"hidden_size": size, "head_dim": dimensions(config)[0].head_dim}


def members(model: PreTrainedModel) -> Iterator[tuple[Any, int]]:
    """(module, dim) of every matrix that reads (its columns, dim 1) or writes (its rows, dim 0) the residual stream.

    A head that is tied to the embedding is left out.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield embedding, 1
    if head is not None and head.weight is not embedding.weight:
        yield head, 1
    for block in blocks(model):
        for attention in block.attentions:
            yield from ((linear, 1) for linear in (attention.q, attention.k, attention.v))
            yield attention.o, 0
        yield from ((linear, 1) for linear in block.feed_forward.inputs)
        yield block.feed_forward.output, 0


def residual_group(model: PreTrainedModel) -> Group:
    """The matrices that share the residual stream's channels."""
    return Group(tuple(Member(module, dim) for module, dim in members(model)), model.config.hidden_size)


def norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms of the residual stream: those of the blocks and the last of each stack, not those of heads (Qwen 3)."""
    inside = {module for block in blocks(model) for attention in block.attentions for module in attention.module.modules()}
    return [module for module in model.modules() if _is_norm(module) and module not in inside]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and hasattr(module, "weight")


def activations(model: PreTrainedModel, examples: Tensor) -> Tensor:
    """Minitron's importance of the hidden channels: the size of what the norms let through on the text, float32 [hidden].

    Of every norm's output the mean magnitude over the positions of a block, its L2 norm over the blocks, and of these the sum
    over all norms.
    """
    import torch

    watched = norms(model)
    squares = [torch.zeros(model.config.hidden_size, dtype=torch.float64, device=model.device) for _ in watched]
    with torch.inference_mode(), _adding_squares(watched, squares):
        for part in examples.split(BATCH):
            forwarded(model, inputs_and_labels(model.config, part.to(model.device))[0])
    return sum((square.sqrt() for square in squares), torch.zeros_like(squares[0])).float().cpu()


@contextmanager
def _adding_squares(watched: list[nn.Module], squares: list[Tensor]) -> Iterator[None]:
    """While open, every norm adds the squared mean magnitudes of its output [batch, positions, hidden] to its place."""

    def hook(place: int) -> Any:
        def add(module: nn.Module, arguments: Any, output: Tensor) -> None:
            squares[place] += output.abs().mean(1).double().square().sum(0)

        return add

    handles = [module.register_forward_hook(hook(place)) for place, module in enumerate(watched)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(model: PreTrainedModel, kept: Tensor) -> None:
    """Cut the residual stream of a model down to the channels `kept`, in place. The config stays as it was."""
    whole = model.config.hidden_size
    users = [module for module in model.modules() if getattr(module, "weight", None) is model.get_input_embeddings().weight]
    for module, dim in list(members(model)):
        surgery.replace_weight(module, module.weight[kept] if dim == 0 else module.weight[:, kept])
        if dim == 0 and module.bias is not None:
            surgery.replace_bias(module, module.bias[kept])
    for module in users:  # a tied head, and the embeddings that an encoder and a decoder share
        module.weight = model.get_input_embeddings().weight
    for module in norms(model):
        surgery.replace_weight(module, module.get_parameter("weight")[kept])
    _keep_scale(model, whole, len(kept))


def _keep_scale(model: PreTrainedModel, whole: int, size: int) -> None:
    """T5 divides what a tied head reads by the root of the hidden size: keep the old divisor, in the weights of the last norm."""
    import torch

    if not getattr(model.config, "scale_decoder_outputs", False):
        return
    with torch.no_grad():
        model.base_model.get_parameter("decoder.final_layer_norm.weight").mul_((size / whole) ** 0.5)


def check(spec: WidthSpec, facts: CheckpointFacts) -> None:
    """Raise StageError where the hidden size follows from the heads, RecipeError for a size out of range."""
    surgery.require_resizable(facts.config, _sizes(facts.config, target_size(spec, facts.config)))


def _refusal(_: WidthSpec, parent: Parent) -> str | None:
    """Vectors that are narrower are compared with none, and what labels are made of is cut by nobody."""
    if parent.task not in HEADED:
        return None
    return f"{parent.task} + width: what it answers is made of the whole hidden state; prune heads, channels or layers instead"


WIDTH = Pruner(WidthSpec, prune, refusal=_refusal, check=check)
