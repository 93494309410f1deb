"""What a text is answered with: a vector, labels, or a label for each token; one shape for all who train or compare models.

Answers are [batch, positions, width]: logits of tokens; of labels (one position, or one of two logits for each label that stands
or not by itself, as of a reranker's single one); a vector (one position). So a softmax over the width is the model's own
distribution, except of vectors, which are compared by their angle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import DataError
from featherweight.model.architecture import EMBEDDING, answers_by_decoder, task_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Dense:
    """A layer that a vector goes through behind its pooling, as sentence-transformers' Dense; its weights lie at `path` below the
    checkpoint, which carries them beside its own. residual: what goes in is added to what comes out.
    """

    path: str
    activation: str = "Identity"
    residual: bool = False

    def __call__(self, vectors: Tensor, folder: str) -> Tensor:
        """[batch, width] -> [batch, another]; folder: the checkpoint."""
        from torch.nn.functional import linear

        file = Path(folder) / self.path / DENSE
        weights = {name: tensor.to(vectors) for name, tensor in _stored(str(file), file.stat().st_mtime_ns).items()}
        found = _activations()[self.activation]()(linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
        if not self.residual:
            return found
        return found + (linear(vectors, weights["residual.weight"]) if "residual.weight" in weights else vectors)


DENSE = "model.safetensors"
LAYERS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
"""Classes of torch.nn that a Dense module's activation may be."""


def _activations() -> dict[str, Any]:
    """Those classes, by name."""
    from torch import nn

    return {name: getattr(nn, name) for name in LAYERS}


@lru_cache(maxsize=8)
def _stored(file: str, _: int) -> dict[str, Tensor]:
    """The tensors of a file; _: when it was written."""
    from safetensors.torch import load_file

    return load_file(file)


@dataclass(frozen=True)
class SentenceEmbedding:
    """How a text's vector is made of its tokens', as sentence-transformers' files say it.

    pooling: one or more of POOLINGS, put end to end. dense: what that goes through. max_tokens: longer texts are cut, the frame
    included. lower_case, prompt: what is done to a text before it is cut into tokens. prompts: others, which a request names.
    folder: of the checkpoint, whose config does not say it. width: how many numbers of a vector are kept, None for all of them.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""
    dense: tuple[Dense, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    width: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> SentenceEmbedding:
        """As `config` says it; the mean of all tokens where it says nothing, as sentence-transformers does."""
        told = dict(getattr(config, EMBEDDING, None) or {})
        dense = tuple(Dense(**one) for one in told.pop("dense", ()))
        pooling = tuple(told.pop("pooling", ("mean",)))
        return cls(**told, pooling=pooling, dense=dense, folder=str(getattr(config, "name_or_path", "")))

    def settings(self) -> dict[str, Any]:
        """What `of` reads, for config.json."""
        told = {name: value for name, value in asdict(self).items() if name != "folder"}
        seldom = {name: told.pop(name) for name in ("dense", "prompts", "width")}
        more = {name: value for name, value in seldom.items() if value}
        return {EMBEDDING: {**told, "pooling": list(self.pooling), **more}}

    def prepared(self, text: str, prompt: str | None = None) -> str:
        """The text as the tokenizer gets it, behind the prompt of that name, or that of every text. Raises DataError."""
        if prompt is not None and prompt not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise DataError(f"this model has no prompt '{prompt}'; it has {known}")
        text = (self.prompt if prompt is None else self.prompts[prompt]) + text
        return text.lower() if self.lower_case else text

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, width] and the tokens that are no padding, [batch, tokens] -> a vector each, [batch, width]."""
        import torch

        vectors = torch.cat([POOLINGS[name](hidden, mask.to(hidden.dtype).unsqueeze(-1)) for name in self.pooling], -1)
        for one in self.dense:
            vectors = one(vectors, self.folder)
        vectors = torch.nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors
        return vectors[..., : self.width]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9).sqrt()


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, -1e9).amax(1)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    import torch

    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[None, :, None] * mask
    return (hidden * places).sum(1) / places.sum(1).clamp_min(1e-9)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.gather(1, _place(mask.argmax(1), hidden))[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.gather(1, _place(mask.shape[1] - 1 - mask.flip(1).argmax(1), hidden))[:, 0]


def _place(index: Tensor, hidden: Tensor) -> Tensor:
    """What gathers one position of each of hidden states [batch, tokens, width]; index: [batch], or [batch, 1]."""
    return index.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "max": _max,
    "weightedmean": _weighted_mean,
    "cls": _first,
    "lasttoken": _last,
}
"""By sentence-transformers' names: hidden states [batch, tokens, width] and mask [batch, tokens, 1] -> [batch, width]."""


def takes_types(config: PreTrainedConfig) -> bool:
    """Whether the model is told which of two texts a token belongs to."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def by_label(config: PreTrainedConfig) -> bool:
    """Whether each label stands or not by itself, and not one of all: several labels of a text, or a reranker's only one."""
    return config.num_labels == 1 or getattr(config, "problem_type", None) == "multi_label_classification"


BEYOND_THE_MASK = ("canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "xlnet", "yoso")
"""Model types that answer a text otherwise where padding stands behind it, masked or not: convolutions, Fourier transforms,
landmarks and summaries reach into it (transformers 5.17)."""


def takes_padding(config: PreTrainedConfig) -> bool:
    """Whether texts of several lengths may be answered together."""
    return config.model_type not in BEYOND_THE_MASK


def says_a_number(config: PreTrainedConfig) -> bool:
    """Whether its answer is one number on a scale of its own, as of similarity or stars, and no label."""
    return config.num_labels == 1 and getattr(config, "problem_type", None) == "regression"


def answers(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What `model` answers to keyword arguments of its forward: [batch, positions, width], see the head of this file."""
    return read(model.config, forwarded(model, inputs), inputs)


def forwarded(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The output of `model`'s forward; of a decoder that labels texts the logits behind every token, of which `read` takes one.

    Its own forward takes one text at a time where the config names no padding token.
    """
    told = {**inputs, **options} | ({"use_cache": False} if answers_by_decoder(model.config) else {})
    if not by_last_token(model.config):
        return model(**told)
    output = model.base_model(**told)
    output["logits"] = model.score(output.last_hidden_state)
    return output


def by_last_token(config: PreTrainedConfig) -> bool:
    """Whether a decoder labels each text, by the last token that it reads."""
    return task_of(config) == "text-classification" and answers_by_decoder(config)


def states(config: PreTrainedConfig, output: Any) -> Tensor:
    """The hidden states, or logits, of an output that `read` makes answers of."""
    return output.last_hidden_state if task_of(config) == "feature-extraction" else output.logits


def read(config: PreTrainedConfig, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The answers in a model's output to `inputs`."""
    return read_states(config, states(config, output), inputs)


def read_states(config: PreTrainedConfig, found: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The answers that are made of what `states` tells of an output to `inputs`."""
    import torch

    task = task_of(config)
    if task == "feature-extraction":
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(found[..., 0]) if mask is None else mask
        return SentenceEmbedding.of(config).pool(found, mask).unsqueeze(1)
    if task != "text-classification":
        return found
    if by_last_token(config):
        found = found.gather(1, _place(_read_last(config, inputs), found))[:, 0]
    if by_label(config):
        return torch.stack([torch.zeros_like(found), found], -1)
    return found.unsqueeze(1)


def _read_last(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> Tensor:
    """Where each text has the token by which a decoder labels it, [batch]: the last that is not the padding token.

    So do transformers' classes have it, of a text that ends in that very token too; where none is named, the last of all.
    """
    import torch

    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    there = torch.ones_like(ids) if mask is None else mask
    pad = config.get_text_config().pad_token_id
    if pad is not None:
        there = there * (ids != pad)
    return (torch.arange(ids.shape[1], device=ids.device) * there).argmax(1)
