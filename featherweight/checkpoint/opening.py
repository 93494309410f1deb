"""Opening the models of checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import CheckpointError, RecipeError
from featherweight.model.architecture import attention_options, auto_class
from featherweight.model.positions import context_refusal
from featherweight.system import device

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


CONFIG, GENERATION = "config.json", "generation_config.json"


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


def require_context(config: PreTrainedConfig, sequence: int, stage: str) -> None:
    """Refuse to train on sequences longer than the positions that the model knows."""
    if reason := context_refusal(config, sequence, stage):
        raise RecipeError(reason)


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def generation_config(folder: Path, config: PreTrainedConfig | None = None, *, beside: bool = True) -> GenerationConfig:
    """How a checkpoint wants its texts written, as transformers reads it.

    Where no file of its own lies beside it, by what config.json itself says: a `config` that is open has lost the settings of
    older checkpoints, and has ends that the file does not name. Not `beside`: by `config`, as of a GGUF file.
    """
    from transformers import GenerationConfig

    if beside and (folder / GENERATION).is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    if beside:
        return GenerationConfig.from_pretrained(folder, CONFIG, _from_model_config=True, local_files_only=True)
    return GenerationConfig.from_model_config(config or load_config(folder))


def starting_token(told: GenerationConfig) -> int:
    """The token that `generate` begins targets with; raises CheckpointError where there is none, or one for each of a batch."""
    start = told.bos_token_id if told.decoder_start_token_id is None else told.decoder_start_token_id
    only = start[0] if isinstance(start, list) and len(start) == 1 else start
    if isinstance(only, int):
        return only
    none = "nothing names the token that its texts begin with"
    found = none if only is None else f"decoder_start_token_id is {only!r}, not one token"
    raise CheckpointError(f"{found}, so that transformers' generate fails; put decoder_start_token_id into {GENERATION}")


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder, its weights without memory and values."""
    import torch

    config = load_config(folder)
    with torch.device("meta"):
        return auto_class(config).from_config(config, **attention_options(config))


def load_model(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder with its family's head, float32, from local safetensors only, on the device in use."""
    import torch

    config = load_config(folder)
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **attention_options(config)}
    model = auto_class(config).from_pretrained(folder, local_files_only=True, **options)
    return device.place(model)


def parameters(model: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())
