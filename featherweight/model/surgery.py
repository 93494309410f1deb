"""Slicing models: whole layers, groups of attention heads, MLP channels, tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featherweight.errors import RecipeError, StageError
from featherweight.model.architecture import LAYOUTS, Attention, FeedForward, Role, Stack, attention_options, auto_class, stacks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


def stack_sizes(config: PreTrainedConfig) -> dict[Role, int]:
    """Number of layers of each stack; StageError for a model type whose structure is not known."""
    layouts = LAYOUTS.get(config.model_type)
    if layouts is None:
        raise StageError(f"the structure of a '{config.model_type}' model is not known here; known: {', '.join(sorted(LAYOUTS))}")
    return {layout.role: getattr(config, layout.count) for layout in layouts}


def chosen_layers(wanted: int | tuple[int, ...], total: int) -> tuple[int, ...]:
    """Layers to keep of `total`: a number means that many, evenly spaced, first and last included; or explicit indices.

    Raises RecipeError for a number or an index out of range, and for indices that do not rise.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= total:
            raise RecipeError(f"distill.layers: {wanted} layers asked of a teacher with {total}; give 1 to {total}")
        return tuple(round(place * (total - 1) / max(1, wanted - 1)) for place in range(wanted))
    return rising_layers("distill.layers", wanted, total)


def rising_layers(key: str, layers: tuple[int, ...], total: int) -> tuple[int, ...]:
    """The very `layers`; raises RecipeError, which names the recipe's `key`, where they do not rise or the model lacks one."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= total:
        raise RecipeError(f"{key}: {list(layers)} must be rising layer numbers between 0 and {total - 1}")
    return layers


def copy_layers(model: PreTrainedModel, layers: tuple[int, ...] | Mapping[Role, tuple[int, ...]]) -> PreTrainedModel:
    """A new model made of the given layers of every stack of `model`, or of the stacks named; the rest is copied whole.

    Layers that are left out are never copied. A position bias that T5 keeps in the first layer moves to the new first one.
    """
    from torch import nn

    copied: dict[int, Any] = {}
    kept = {}
    for stack in stacks(model):
        kept[stack.role] = layers if isinstance(layers, tuple) else layers.get(stack.role, tuple(range(len(stack.blocks))))
        chosen = [copy.deepcopy(stack.blocks[index].module, copied) for index in kept[stack.role]]
        _move_position_bias(stack.blocks[0].module, chosen[0])
        copied[id(stack.layers)] = nn.ModuleList(chosen)
    student = copy.deepcopy(model, copied)
    for stack in stacks(student):
        _renumber(student, stack, kept[stack.role])
    return student


def _renumber(model: PreTrainedModel, stack: Stack, kept: tuple[int, ...]) -> None:
    """Tell the layers their new places, and the configs of the model and of the stack how many there are."""
    for place, block in enumerate(stack.blocks):
        for module in (found for found in block.module.modules() if hasattr(found, "layer_idx")):
            setattr(module, "layer_idx", place)  # noqa: B010 - mypy takes a module's attributes for tensors
    setattr(model.config, stack.count, len(kept))
    holder: Any = next(module for module in model.modules() if stack.layers in module.children())
    if getattr(holder, "config", model.config) is not model.config:
        # T5 gives each stack a config of its own, in which its layers are `num_layers`, the decoder's too.
        holder.config.num_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kinds[index] for index in kept]


def _move_position_bias(first: Any, new_first: Any) -> None:
    """Give a copied layer the relative position bias that the layers of its T5 stack share."""
    for name, module in first.named_modules():
        if getattr(module, "has_relative_attention_bias", False):
            attention = new_first.get_submodule(name)
            attention.relative_attention_bias = copy.deepcopy(module.relative_attention_bias)
            attention.has_relative_attention_bias = True


def group_rows(groups: Tensor, size: int) -> Tensor:
    """Indices of the rows of the given groups of `size` rows each: int64 [groups * size]."""
    import torch

    return (groups[:, None] * size + torch.arange(size)).flatten()


def keep_attention_groups(attention: Attention, groups: Tensor) -> None:
    """Cut an attention down to the key/value `groups`, each with its query heads, and their columns of a position bias."""
    queries = attention.heads // attention.kv_heads
    heads = group_rows(groups, queries)
    _keep_outputs(attention.q, group_rows(heads, attention.head_dim))
    _keep_outputs(attention.k, group_rows(groups, attention.head_dim))
    _keep_outputs(attention.v, group_rows(groups, attention.head_dim))
    _keep_inputs(attention.o, group_rows(heads, attention.head_dim))
    bias = position_bias(attention)
    if bias is not None:
        replace_weight(bias, bias.weight[:, heads])


def position_bias(attention: Attention) -> nn.Embedding | None:
    """The relative position bias [buckets, heads] that T5 keeps in the first attention of a stack, for all of them."""
    return getattr(attention.module, "relative_attention_bias", None)


def keep_channels(feed_forward: FeedForward, channels: Tensor) -> None:
    """Cut a feed-forward network down to the given hidden channels."""
    for linear in feed_forward.inputs:
        _keep_outputs(linear, channels)
    _keep_inputs(feed_forward.output, channels)


def silence_channels(feed_forward: FeedForward, kept: Tensor) -> None:
    """Set all of a feed-forward network's hidden channels but `kept` to zero; training leaves them so (no gradient)."""
    import torch

    lost = _others(kept, feed_forward.output.in_features)
    with torch.no_grad():
        for linear in feed_forward.inputs:
            for weight in linear.parameters():
                weight[lost] = 0
        feed_forward.output.weight[:, lost] = 0


def replace_weight(module: nn.Module, weight: Tensor) -> None:
    """Give `module` another weight, of another shape too."""
    from torch import nn

    module.weight = nn.Parameter(weight.detach().clone())


def replace_bias(module: nn.Module, bias: Tensor) -> None:
    """Give `module` another bias."""
    from torch import nn

    module.bias = nn.Parameter(bias.detach().clone())


def _keep_outputs(linear: nn.Linear, kept: Tensor) -> None:
    import torch_pruning

    torch_pruning.prune_linear_out_channels(linear, _others(kept, linear.out_features))


def _keep_inputs(linear: nn.Linear, kept: Tensor) -> None:
    import torch_pruning

    torch_pruning.prune_linear_in_channels(linear, _others(kept, linear.in_features))


def _others(kept: Tensor, total: int) -> list[int]:
    """The indices below `total` that are not kept."""
    return sorted(set(range(total)) - set(kept.tolist()))


def resized_config(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """`config` with other sizes.

    transformers refuses a Llama whose hidden size is no multiple of its heads; it is then described as a Mistral without
    sliding window, which computes the same. Raises StageError for a Llama with biases there: a Mistral has none.
    """
    from transformers import MistralConfig

    require_resizable(config, values)
    new = config.to_dict() | dict(values)
    if not _uneven_llama(config, new):
        return of_the_same(config, type(config).from_dict(new))
    for key in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        new.pop(key, None)
    named = [kind.replace("Llama", "Mistral", 1) for kind in config.architectures or []]  # what its head is for
    return of_the_same(config, MistralConfig.from_dict(new | {"sliding_window": None, "architectures": named or None}))


def of_the_same(config: PreTrainedConfig, other: PreTrainedConfig) -> PreTrainedConfig:
    """`other`, of the same checkpoint as `config`: it has what lies beside it."""
    other.name_or_path = config.name_or_path
    return other


def require_resizable(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Raise StageError where no config says that the model has such sizes."""
    new = config.to_dict() | dict(values)
    if _uneven_llama(config, new) and (config.attention_bias or config.mlp_bias):
        raise StageError(
            f"a Llama with biases cannot have {new['num_attention_heads']} heads at hidden size {new['hidden_size']}: "
            "transformers wants a multiple; choose another prune ratio, or prune.attention: false"
        )


def _uneven_llama(config: PreTrainedConfig, new: Mapping[str, Any]) -> bool:
    return config.model_type == "llama" and new["hidden_size"] % new["num_attention_heads"] != 0


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def keep_tokens(model: PreTrainedModel, config: PreTrainedConfig, tokens: Sequence[int]) -> PreTrainedModel:
    """A model of `config`, which is that of `model` but for its vocabulary, with the rows of `tokens` alone.

    Cut is whatever has a row for each token: embeddings, heads and their biases, added logits. The rest is not copied.
    """
    import torch

    rows, sizes = torch.tensor(tokens), {name: tensor.shape for name, tensor in _empty(config).state_dict().items()}
    cut: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in cut:
            cut[id(tensor)] = _rows(tensor.detach(), sizes[name], rows)
    weights = {name: cut[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    return _filled(model, config, weights)


def _rows(tensor: Tensor, size: Sequence[int], rows: Tensor) -> Tensor:
    """The `rows` of `tensor`, along the dimension in which it is larger than `size`."""
    for place, (old, new) in enumerate(zip(tensor.shape, size, strict=True)):
        if old != new:
            return tensor.index_select(place, rows.to(tensor.device))
    return tensor


def with_config(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` that takes over the (already sliced) weights of `model`, without a copy."""
    return _filled(model, config, model.state_dict())


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` without memory."""
    import torch

    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=torch.float32, **attention_options(config))


def _filled(model: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of `config` with these weights, its head tied where that of `model` is."""
    result = _empty(config)
    result.load_state_dict(weights, strict=True, assign=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:  # T5's config says tied whatever the weights are
        result.tie_weights()
    return result
