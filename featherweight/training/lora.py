"""LoRA: small adapters trained beside frozen weights, and merged back into them (Hu et al. 2021, through peft)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from featherweight.errors import RecipeError
from featherweight.training.spec import LoraSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, spec: LoraSpec, seed: int = 0) -> PeftModel:
    """Freeze `model` and put adapters beside its linear layers, in place: B is zero, so that nothing changes yet.

    Returns peft's wrapper, which `merge` takes; `model` itself goes on computing, adapters included. Raises RecipeError for
    targets that the model does not have, or whose weight another module shares.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, spec.alpha),  # peft only divides it by the rank
        lora_dropout=spec.dropout,
        target_modules=_targets(model, spec),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The plain model whose weights are W + alpha / rank · B A; all of them can be trained again."""
    model = adapted.merge_and_unload()
    return model.requires_grad_(True)


def unknown_target(spec: LoraSpec, known: Sequence[str]) -> str | None:
    """Why the targets are none of the linear layers that a model has, by the last part of their names; None where they are."""
    missing = [target for target in spec.targets or () if target not in known]
    return f"lora.targets: the model has no linear layer '{missing[0]}'; it has {', '.join(known)}" if missing else None


def _targets(model: PreTrainedModel, spec: LoraSpec) -> str | list[str]:
    """peft's word for the targets: all linear layers but the output head, or those that the recipe names."""
    from torch import nn

    if spec.targets is None:
        return "all-linear"
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if reason := unknown_target(spec, known):
        raise RecipeError(reason)
    for target in spec.targets:
        if sharing := _sharing(model, target):
            raise RecipeError(
                f"lora.targets: the weight of '{target}' is that of '{sharing}' too, which adapters beside one of them would leave "
                f"behind; leave '{target}' out, or finetune without lora"
            )
    return list(spec.targets)


def _sharing(model: PreTrainedModel, target: str) -> str | None:
    """Name of a module whose weight is also that of a linear layer called `target`; None where there is none."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    owners = {name.removesuffix(".weight"): id(weight) for name, weight in weights.items()}
    targets = {name: owner for name, owner in owners.items() if name.rpartition(".")[2] == target}
    return next((name for name, owner in owners.items() if name not in targets and owner in targets.values()), None)
