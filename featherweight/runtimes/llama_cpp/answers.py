"""Vectors and labels by decoders, of the states that llama.cpp leaves behind every token. A head lies beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.model.architecture import task_of
from featherweight.model.heads import SentenceEmbedding, read_states
from featherweight.text.examples import packed_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from featherweight.runtimes.interface import Tokens
    from featherweight.runtimes.llama_cpp.loaded import LlamaCppModel

HEAD = "head.safetensors"
POOLINGS = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""What llama.cpp's own server makes of a file's tokens where the file says so: gguf's name of each of ours that it has."""


def head_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """What stands behind the states of a model that labels texts, 'weight' and perhaps 'bias', which no GGUF file holds."""
    inner = f"{model.base_model_prefix}."
    if model.base_model is model or task_of(model.config) == "text-generation":
        return {}
    return {name.rpartition(".")[2]: value for name, value in model.named_parameters() if not name.startswith(inner)}


def write_head(model: PreTrainedModel, out: Path) -> None:
    """Put a model's head, in float32, into the folder `out` where it has one."""
    from safetensors.torch import save_file

    if head := head_parameters(model):
        save_file({name: value.detach().float().contiguous().cpu() for name, value in head.items()}, out / HEAD)


def pooling(config: Any) -> str | None:
    """gguf's name of how a text's vector is made; None where llama.cpp's own server cannot make it so, and for labels."""
    if task_of(config) != "feature-extraction":
        return None
    told = SentenceEmbedding.of(config)
    return POOLINGS.get(told.pooling[0]) if len(told.pooling) == 1 and not (told.dense or told.width) else None


class Answering:
    """What a model that llama.cpp has loaded answers to texts."""

    def __init__(self, model: LlamaCppModel, config: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        self.model, self.config = model, config
        self.head = load_file(folder / HEAD) if (folder / HEAD).exists() else {}

    def __call__(self, ids: Tokens, types: Tokens) -> Tensor:
        """[texts, positions, width], see featherweight/model/heads.py; no more texts than there are places."""
        from torch.nn.functional import linear

        found = self._states(ids)
        if self.head:
            found = linear(found, self.head["weight"], self.head.get("bias"))
        return read_states(self.config, found, packed_inputs(self.config, ids, types))

    def _states(self, ids: Tokens) -> Tensor:
        """Of every token, [texts, longest, width]; zeros behind shorter texts."""
        import torch

        entries = [(token, place, slot, True) for slot, row in enumerate(ids) for place, token in enumerate(row)]
        for slot in range(len(ids)):
            self.model.forget(slot)
        most = self.model.at_once
        rows = torch.cat([self.model.states(entries[at : at + most]) for at in range(0, len(entries), most)])
        if not rows.isfinite().all():
            raise StageError("llama.cpp left states that are no numbers; export the variant again")
        return torch.nn.utils.rnn.pad_sequence(list(rows.split([len(row) for row in ids])), batch_first=True)
