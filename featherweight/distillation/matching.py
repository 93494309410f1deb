"""Hidden states and attention maps: what a student's layers take over from the teacher's beside its answers.

Jiao et al. 2020 (TinyBERT): mean squared error of the hidden states behind mapped layers, through a learned projection where
their widths differ. Wang et al. 2020 (MiniLM): KL of the attention distributions; or their squared error, near TinyBERT. Of
their mean over heads where the numbers of heads differ. Stacks of an encoder-decoder are matched each with its like; its
decoder's cross-attention counts as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from featherweight.distillation.spec import DistillSpec, StackMap
from featherweight.errors import RecipeError
from featherweight.model.architecture import Role, family_of, stacks
from featherweight.model.heads import forwarded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

MAPS: Mapping[str, Mapping[Role, tuple[str, ...]]] = {
    "causal": {"decoder": ("attentions",)},
    "encoder": {"encoder": ("attentions",), "decoder": ("attentions",)},
    "seq2seq": {"encoder": ("encoder_attentions",), "decoder": ("decoder_attentions", "cross_attentions")},
}
"""Where a family's output has the attention maps of each stack; a decoder's, too, where vectors are made of what it reads."""


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the teacher's layer that it is to resemble."""

    role: Role
    student: int
    teacher: int


def layer_pairs(wanted: Any, student: Mapping[Role, int], teacher: Mapping[Role, int]) -> tuple[Pair, ...]:
    """The pairs of a `layer_map`, for stacks of these sizes. Raises RecipeError for stacks or layers that are not there."""
    if isinstance(wanted, StackMap):
        wanted.require_known("distill.layer_map", student)
    pairs = []
    for role, count in student.items():
        own = getattr(wanted, role) or "uniform" if isinstance(wanted, StackMap) else wanted
        pairs += [Pair(role, *places) for places in _places(own, count, teacher[role])]
    return tuple(pairs)


def _places(wanted: str | tuple[int, ...], count: int, total: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer) of a stack of `count` layers under a teacher's of `total`."""
    if wanted == "last":
        return [(count - 1, total - 1)]
    if wanted == "uniform":
        return [(place, max(0, round((place + 1) * total / count) - 1)) for place in range(count)]
    layers = cast("tuple[int, ...]", wanted)
    if len(layers) != count or not all(0 <= layer < total for layer in layers):
        raise RecipeError(
            f"distill.layer_map {list(layers)}: give one layer of the teacher's {total} (0 to {total - 1}) for each of the "
            f"student's {count}"
        )
    return list(enumerate(layers))


class Matcher:
    """Compares mapped layers of two models. `projections` (a ModuleList) are to be trained along with the student."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, pairs: Sequence[Pair], spec: DistillSpec, seed: int):
        self.spec, self.pairs = spec, pairs
        self.maps = MAPS[family_of(teacher.config)]
        layers = [_layers(model) for model in (teacher, student)]
        self.teachers = [layers[0][pair.role][pair.teacher] for pair in pairs]
        self.students = [layers[1][pair.role][pair.student] for pair in pairs]
        self.projections = _projections(student, teacher, len(pairs) if spec.hidden_weight else 0, seed)
        self.steady = [attention.module for stack in stacks(student) for block in stack.blocks for attention in block.attentions]
        if spec.attention_weight:
            for model in (teacher, student):
                show_maps(model)

    def run(self, model: PreTrainedModel, inputs: Mapping[str, Any], teacher: bool) -> tuple[Any, list[Tensor]]:
        """The model's output, with its attention maps where they are wanted, and the hidden states behind the mapped layers."""
        if self.spec.attention_weight and not teacher:
            for module in self.steady:
                module.eval()  # maps are told after dropout, and a dropped entry would look like a disagreement
        with captured(self.teachers if teacher else self.students) as states:
            output = forwarded(model, inputs, output_attentions=self.spec.attention_weight > 0)
        return output, states

    def loss(self, of_student: tuple[Any, list[Tensor]], of_teacher: tuple[Any, list[Tensor]], real: Mapping[Role, Tensor]) -> Any:
        """The weighted sum of both comparisons, each a mean over the pairs. real: positions that are no padding, by stack."""
        total: Any = 0.0
        if self.spec.hidden_weight:
            both = zip(of_student[1], of_teacher[1], strict=True)
            terms = [self._hidden(place, ours, theirs, real) for place, (ours, theirs) in enumerate(both)]
            total = total + self.spec.hidden_weight * sum(terms) / len(terms)
        if self.spec.attention_weight:
            compare = MAP_LOSSES[self.spec.attention_loss]
            terms = [
                compare(of_student[0][name][pair.student], of_teacher[0][name][pair.teacher], real[pair.role])
                for pair in self.pairs
                for name in self.maps[pair.role]
            ]
            total = total + self.spec.attention_weight * sum(terms) / len(terms)
        return total

    def _hidden(self, place: int, ours: Tensor, theirs: Tensor, real: Mapping[Role, Tensor]) -> Tensor:
        projection = self.projections[place] if len(self.projections) else None
        return state_error(ours, theirs, real[self.pairs[place].role], projection)


def show_maps(model: PreTrainedModel) -> None:
    """Switch to the attention that tells its maps, in the stacks' own configs too, which `set_attn_implementation` leaves out."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            cast("Any", module).config._attn_implementation = "eager"


def state_error(ours: Tensor, theirs: Tensor, real: Tensor, projection: nn.Module | None = None) -> Tensor:
    """Mean squared error of hidden states [batch, positions, width] over the `real` positions [batch, positions]."""
    moved = ours if projection is None else projection(ours)
    return (moved - theirs).square().mean(-1)[real].mean()


def map_divergence(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """KL(theirs || ours) of attention distributions [batch, heads, queries, keys], a mean over heads and `real` queries."""
    import torch

    ours, theirs = _like_heads(ours, theirs)
    least = torch.finfo(ours.dtype).tiny  # a masked key has no weight in either
    kl = (theirs * (theirs.clamp_min(least).log() - ours.clamp_min(least).log())).sum(-1)
    return kl.mean(1)[real].mean()


def map_error(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of attention distributions [batch, heads, queries, keys] over heads, `real` queries and all keys.

    TinyBERT compares the scores before their softmax, which transformers' models do not tell.
    """
    ours, theirs = _like_heads(ours, theirs)
    return (ours - theirs).square().mean((1, 3))[real].mean()


def _like_heads(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps as they are, or their means over heads where these are not as many."""
    if ours.shape[1] == theirs.shape[1]:
        return ours, theirs
    return ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)


MAP_LOSSES = {"kl": map_divergence, "mse": map_error}
"""What `attention_loss` names."""


@contextmanager
def captured(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What the modules put out while the context lasts, in their order: of a tuple the first, the hidden states."""
    found: dict[nn.Module, Tensor] = {}
    states: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        yield states
        states.extend(found[module] for module in modules)
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: PreTrainedModel) -> dict[Role, list[nn.Module]]:
    return {stack.role: [block.module for block in stack.blocks] for stack in stacks(model)}


def _projections(student: PreTrainedModel, teacher: PreTrainedModel, count: int, seed: int) -> nn.ModuleList:
    """One linear map per pair from the student's width to the teacher's; none where they are equal."""
    import torch

    widths = student.config.hidden_size, teacher.config.hidden_size
    if widths[0] == widths[1]:
        count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.ModuleList(torch.nn.Linear(*widths) for _ in range(count)).to(student.device)
