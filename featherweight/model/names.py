"""The names of tensors: in a checkpoint's files they are not always those of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reading(model: PreTrainedModel) -> Callable[[str], str]:
    """The name under which `model` holds what a file stores under a name, as transformers loads it: GPT-NeoX's `embed_out` is its
    `lm_head`. What transformers makes of several tensors, such as a layer's experts, keeps its stored names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]
