"""What a recipe says of pruning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from featherweight.spec import Positive, SequenceLength, Share, Spec
from featherweight.training.spec import FinetuneSpec

PRUNE_KEYS = {
    "structured": ("criterion", "ratio", "scope", "attention", "mlp"),
    "depth": ("ratio", "layers", "stack"),
    "width": ("criterion", "ratio", "hidden"),
    "attention": ("kv_heads",),
    "sparse": ("criterion", "sparsity", "pattern"),
}
"""What a pruning method reads, beside the keys that all of them do."""


class PruneSpec(Spec):
    """A smaller model, then recovery training.

    structured: LLM-Pruner's cut of attention groups and MLP channels by `ratio`. attention: heads too; auto: where a config can
    have a number of heads that its hidden size does not follow from. scope: global ranks the MLP channels of all layers
    together, which CTranslate2 alone serves at a gain.
    depth: whole layers of least influence, down to `layers` (a number, or which to keep), or by `ratio`, in every `stack` or one.
    width: the hidden size, to `hidden` or by `ratio`; criterion activation is Minitron's.
    attention: key/value heads pooled to `kv_heads` (1: multi-query), all query heads stay.
    sparse: single weights become zero, in matrices of the same shape, by `criterion` magnitude, wanda (the default there) or
    sparsegpt: the share `sparsity` of them (0.5), or by `pattern` all but N of every M neighbours in a row ("2:4"). Judged on 64
    blocks of 128 tokens by default. No engine here is faster for it.
    """

    method: Literal["structured", "depth", "width", "attention", "sparse"] = "structured"
    criterion: Literal[
        "vectorize",
        "param_first",
        "param_second",
        "param_mix",
        "l1",
        "l2",
        "random",
        "activation",
        "magnitude",
        "wanda",
        "sparsegpt",
    ] = "param_first"
    ratio: Share = 0.25
    sparsity: Share | None = None
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None
    scope: Literal["uniform", "global"] = "uniform"
    attention: bool | Literal["auto"] = "auto"
    mlp: bool = True
    hidden: Positive | None = None
    kv_heads: Positive | None = None
    samples: Positive = 10
    sequence: SequenceLength = 64
    layers: Positive | tuple[int, ...] | None = None
    stack: Literal["all", "encoder", "decoder"] = "all"
    finetune: FinetuneSpec | None = FinetuneSpec()

    @property
    def unread(self) -> dict[str, str]:
        others = [key for keys in PRUNE_KEYS.values() for key in keys if key not in PRUNE_KEYS[self.method]]
        size = next((key for key in ("hidden", "layers") if getattr(self, key) is not None), None)
        return dict.fromkeys(others, f"with method {self.method}") | ({"ratio": f"beside {size}"} if size else {})

    @model_validator(mode="before")
    @classmethod
    def _sparse_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("method") != "sparse":
            return value
        share = {} if value.get("pattern") else {"sparsity": 0.5}
        return {"criterion": "wanda", "samples": 64, "sequence": 128, **share, **value}

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> PruneSpec:
        if self.method == "attention" and self.kv_heads is None:
            raise ValueError("method attention wants kv_heads: how many key/value heads are to be left (1: multi-query)")
        if self.criterion == "activation" and self.method != "width":
            raise ValueError(f"criterion activation is for method width, not {self.method}")
        if self.scope == "global" and not self.mlp:
            raise ValueError("scope global ranks MLP channels: it wants mlp")
        return self

    @model_validator(mode="after")
    def _sparse_or_not(self) -> PruneSpec:
        sparse = self.criterion in ("magnitude", "wanda", "sparsegpt")
        if sparse != (self.method == "sparse"):
            raise ValueError(f"criterion {self.criterion} is {'' if sparse else 'not '}for method sparse, not {self.method}")
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either sparsity (a share) or pattern ('2:4'), not both")
        kept, _, of = (self.pattern or "1:2").partition(":")
        if int(kept) >= int(of):
            raise ValueError(f"pattern {self.pattern} removes nothing; N:M keeps N of every M weights, as 2:4 does")
        return self
