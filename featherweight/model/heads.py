"""What an encoder answers a text with: a vector, labels, or a label for each token; one shape for all who train or compare it.

Answers are [batch, positions, width]: logits of tokens; of labels (one position, or one of two logits for each label that stands
or not by itself, as of a reranker's single one); a vector (one position). So a softmax over the width is the model's own
distribution, except of vectors, which are compared by their angle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import EMBEDDING, task_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class SentenceEmbedding:
    """How a text's vector is made of its tokens', as sentence-transformers' files say it.

    pooling: one or more of POOLINGS, put end to end. max_tokens: longer texts are cut, the frame included.
    lower_case, prompt: what is done to a text before it is cut into tokens.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompt: str = ""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> SentenceEmbedding:
        """As `config` says it; the mean of all tokens where it says nothing, as sentence-transformers does."""
        told = getattr(config, EMBEDDING, None) or {}
        return cls(**{**told, "pooling": tuple(told.get("pooling", ("mean",)))})

    def settings(self) -> dict[str, Any]:
        """What `of` reads, for config.json."""
        return {EMBEDDING: {**asdict(self), "pooling": list(self.pooling)}}

    def prepared(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        text = self.prompt + text
        return text.lower() if self.lower_case else text

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, width] and the tokens that are no padding, [batch, tokens] -> a vector each, [batch, width]."""
        import torch

        vectors = torch.cat([POOLINGS[name](hidden, mask.to(hidden.dtype).unsqueeze(-1)) for name in self.pooling], -1)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors


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
    return index.unsqueeze(-1).expand(-1, 1, hidden.shape[-1])


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
    return read(model.config, model(**inputs), inputs)


def read(config: PreTrainedConfig, output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The answers in a model's output to `inputs`."""
    import torch

    task = task_of(config)
    if task == "feature-extraction":
        hidden = output.last_hidden_state
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(hidden[..., 0]) if mask is None else mask
        return SentenceEmbedding.of(config).pool(hidden, mask).unsqueeze(1)
    if task != "text-classification":
        return output.logits
    if by_label(config):
        return torch.stack([torch.zeros_like(output.logits), output.logits], -1)
    return output.logits.unsqueeze(1)
