"""CTranslate2's encoder: hidden states from it, and the checkpoint's own head behind them, in PyTorch.

CTranslate2 holds embeddings and blocks; what a head adds (a pooler, a classifier) is small, differs from model type to model type,
and is transformers' own code, kept in float32 in a file beside the engine's.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.model.architecture import auto_class, task_of
from featherweight.model.heads import read, takes_types
from featherweight.runtimes.batched import answered
from featherweight.runtimes.ctranslate2.views import in_memory
from featherweight.runtimes.interface import Generation, Timing, Tokens, alike
from featherweight.text.examples import packed_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HEAD = "head.safetensors"


def head_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of `model` that CTranslate2's encoder does not hold, by name."""
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    held = {name for name, _ in model.named_parameters() if name.startswith(base) and ".pooler." not in f".{name}"}
    return {name: tensor.detach().contiguous() for name, tensor in model.named_parameters() if name not in held}


def write_head(model: PreTrainedModel, folder: Path) -> None:
    """Write the head of `model` to `folder`; an empty file of an encoder that makes vectors."""
    from safetensors.torch import save_file

    save_file(head_tensors(model), folder / HEAD, metadata={"format": "pt"})


class Encoder:
    """An encoder in CTranslate2 and its head. `most`: sequences at once."""

    def __init__(self, weights: Path, served: Path, device: str, threads: int, compute_type: str, most: int) -> None:
        import ctranslate2
        import torch

        torch.set_num_threads(threads)
        self.config, self.most = load_config(served), most
        self.head = None if task_of(self.config) == "feature-extraction" else _head(self.config, weights / HEAD)
        self.encoder: Any = ctranslate2.Encoder(
            str(weights), device=device, inter_threads=1, intra_threads=threads, compute_type=compute_type
        )

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        """See LoadedModel.outputs. CTranslate2 itself pads sequences of like lengths, and reads none of the padding."""
        return answered(self.config, self.most, ids, types, self._answers)

    def time(self, prompts: Tokens) -> Generation:
        """One pass over prompts, of which nothing is written."""
        began = perf_counter()
        for batch in alike(prompts, self.most):
            some = [prompts[index] for index in batch]
            self._answers(some, [[0] * len(ids) for ids in some])
        seconds = perf_counter() - began
        return Generation([[] for _ in prompts], Timing(seconds, seconds))

    def _answers(self, ids: Tokens, types: Tokens) -> Tensor:
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        inputs = packed_inputs(self.config, ids, types)
        told = {"token_type_ids": inputs["token_type_ids"].tolist()} if takes_types(self.config) else {}
        view = self.encoder.forward_batch(ids, **told).last_hidden_state
        hidden: Any = torch.tensor(in_memory(view))
        with torch.inference_mode():
            given = BaseModelOutputWithPooling(last_hidden_state=hidden)
            return read(self.config, given if self.head is None else self.head(inputs, hidden), inputs)


def _head(config: Any, file: Path) -> Any:
    """What makes a model's output of its inputs and the hidden states that its encoder gave: transformers' own code.

    The encoder itself is never made: in its place stands what hands on the hidden states, through the pooler where there is one.
    """
    import torch
    from safetensors.torch import load_file
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class Given(torch.nn.Module):
        def __init__(self, pooler: Any) -> None:
            super().__init__()
            self.pooler: Any = pooler
            self.hidden: Any = None

        def forward(self, *_: Any, **__: Any) -> Any:
            pooled = None if self.pooler is None else self.pooler(self.hidden)
            return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)

    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    given = Given(getattr(model.base_model, "pooler", None))
    setattr(model, model.base_model_prefix, given)
    model.load_state_dict(load_file(file), assign=True)
    model.eval()

    def run(inputs: dict[str, Tensor], hidden: Tensor) -> Any:
        given.hidden = hidden
        return model(**inputs)

    return run
