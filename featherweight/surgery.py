"""Opening, slicing and saving Llama-like models: whole layers, groups of attention heads, MLP channels."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featherweight.architecture import GATED_DECODERS, auto_class
from featherweight.errors import CheckpointError, RecipeError, StageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound="nn.Module")

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
"""What a checkpoint folder holds beside the model: copied byte for byte from a stage's input to its output."""


def model_type(folder: Path) -> str:
    """The `model_type` of a checkpoint folder; raises CheckpointError where config.json is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give a checkpoint folder with a config") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    return str(config.get("model_type"))


def require_llama_like(folder: Path, stage: str) -> None:
    """Refuse a checkpoint whose architecture `stage` cannot cut, before any weight is read."""
    found = model_type(folder)
    if found not in GATED_DECODERS:
        raise StageError(f"{stage} handles {', '.join(GATED_DECODERS)} models, not '{found}'; leave the stage out for it")


def require_context(config: PreTrainedConfig, sequence: int, stage: str) -> None:
    """Refuse to train on sequences longer than the positions that the model knows."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and sequence > context:
        raise RecipeError(f"{stage}.sequence {sequence} is longer than the model's context of {context}; lower it")


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder with its family's head, float32, from local safetensors only."""
    import torch

    model = auto_class(load_config(folder)).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return to_device(model)


def to_device(model: Model) -> Model:
    """`model` on the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.nn.Module.to(model, torch.device("cuda"))
    return model


def save_model(model: PreTrainedModel, out: Path, source: Path | None = None) -> None:
    """Write `model` to `out` as safetensors, with the tokenizer and the generation settings of the folder `source`."""
    from transformers import GenerationConfig

    # transformers refuses to save generation settings that contradict themselves, as those of many checkpoints do.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(out, max_shard_size="5GB")
    if source is not None:
        for path in [path for pattern in CARRIED for path in source.glob(pattern)]:
            shutil.copyfile(path, out / path.name)


def parameters(model: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


def chosen_layers(wanted: int | tuple[int, ...], total: int) -> tuple[int, ...]:
    """Layers to keep of `total`: a number means that many, evenly spaced, first and last included; or explicit indices.

    Raises RecipeError for a number or an index out of range, and for indices that do not rise.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= total:
            raise RecipeError(f"distill.layers: {wanted} layers asked of a teacher with {total}; give 1 to {total}")
        return tuple(round(place * (total - 1) / max(1, wanted - 1)) for place in range(wanted))
    if not wanted or list(wanted) != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= total:
        raise RecipeError(f"distill.layers: {list(wanted)} must be rising layer numbers between 0 and {total - 1}")
    return wanted


def copy_layers(model: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """A new model made of the given decoder layers of `model`; only they, the embedding and the head are copied."""
    from torch import nn

    decoder = model.model
    whole = decoder.layers
    decoder.layers = nn.ModuleList([whole[index] for index in layers])
    try:
        student = copy.deepcopy(model)
    finally:
        decoder.layers = whole
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    config = student.config
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in layers]
    return student


def group_rows(groups: Tensor, size: int) -> Tensor:
    """Indices of the rows of the given groups of `size` rows each: int64 [groups * size]."""
    import torch

    return (groups[:, None] * size + torch.arange(size)).flatten()


def keep_attention_groups(layer: Any, groups: Tensor, head_dim: int, queries: int) -> None:
    """Cut the attention of a decoder layer down to the key/value `groups`, each with its `queries` query heads."""
    attention = layer.self_attn
    _keep_outputs(attention.q_proj, group_rows(groups, queries * head_dim))
    _keep_outputs(attention.k_proj, group_rows(groups, head_dim))
    _keep_outputs(attention.v_proj, group_rows(groups, head_dim))
    _keep_inputs(attention.o_proj, group_rows(groups, queries * head_dim))


def _keep_outputs(linear: nn.Linear, kept: Tensor) -> None:
    import torch_pruning

    torch_pruning.prune_linear_out_channels(linear, _others(kept, linear.out_features))


def _keep_inputs(linear: nn.Linear, kept: Tensor) -> None:
    import torch_pruning

    torch_pruning.prune_linear_in_channels(linear, _others(kept, linear.in_features))


def _others(kept: Tensor, total: int) -> list[int]:
    """The indices below `total` that are not kept."""
    return sorted(set(range(total)) - set(kept.tolist()))


def mlp_members(mlp: Any, hidden_size: int) -> list[tuple[nn.Linear, int]]:
    """The matrices that share the hidden channels of a gated MLP: (module, 0 where a channel is a row, 1 for a column)."""
    group = _mlp_group(mlp, hidden_size, list(range(mlp.gate_proj.out_features)))
    members = [(part.dep.target.module, 0 if part.dep.handler.__name__ == "prune_out_channels" else 1) for part in group]
    return [(module, dim) for module, dim in members if hasattr(module, "weight")]


def keep_mlp_channels(layer: Any, channels: Tensor, hidden_size: int) -> None:
    """Cut the MLP of a decoder layer down to the given hidden channels, and all that depends on them."""
    removed = _others(channels, layer.mlp.gate_proj.out_features)
    if removed:
        _mlp_group(layer.mlp, hidden_size, removed).prune()


def _mlp_group(mlp: Any, hidden_size: int, channels: list[int]) -> Any:
    """torch-pruning's dependency group of some hidden channels of a gated MLP: every cut that removing them implies."""
    import torch
    import torch_pruning

    weight = mlp.gate_proj.weight
    graph = torch_pruning.DependencyGraph().build_dependency(mlp, torch.zeros(1, 1, hidden_size, device=weight.device))
    return graph.get_pruning_group(mlp.gate_proj, torch_pruning.prune_linear_out_channels, channels)


def pruned_config(config: PreTrainedConfig, kv_heads: int, intermediate_size: int) -> PreTrainedConfig:
    """The config of `config`'s model cut to `kv_heads` key/value groups and `intermediate_size` MLP channels per layer.

    transformers refuses a Llama whose hidden size is no multiple of its heads; it is then described as a Mistral without
    sliding window, which computes the same. Raises StageError for a Llama with biases there: a Mistral has none.
    """
    from transformers import MistralConfig

    queries = config.num_attention_heads // config.num_key_value_heads
    values = config.to_dict() | {
        "num_attention_heads": kv_heads * queries,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim(config),
        "intermediate_size": intermediate_size,
    }
    if config.model_type != "llama" or config.hidden_size % (kv_heads * queries) == 0:
        return type(config).from_dict(values)
    if config.attention_bias or config.mlp_bias:
        raise StageError(
            f"a Llama with biases cannot have {kv_heads * queries} heads at hidden size {config.hidden_size}: transformers "
            "wants a multiple; choose another prune ratio, or prune.attention: false"
        )
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key, None)
    return MistralConfig.from_dict(values | {"sliding_window": None})


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def with_config(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` that takes over the (already sliced) weights of `model`, without a copy."""
    import torch

    weights = model.state_dict()
    with torch.device("meta"):
        result = auto_class(config).from_config(config, dtype=torch.float32)
    result.load_state_dict(weights, strict=True, assign=True)
    result.tie_weights()
    return result
