"""Which of PyTorch's attention kernels is taken: flash, memory-efficient, cuDNN, or plain products (math). Found by asking.

scaled_dot_product_attention chooses by device, dtype, head size, mask and grouping, and says nothing of it; the function by which
it chooses (`torch._fused_sdp_choice`, aten/src/ATen/native/transformers) is asked here with the very tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from featherweight.model.architecture import family_of
from featherweight.model.heads import forwarded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pass = Literal["prompt", "step"]
NAMES = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "the device's own"}
"""By the values of torch.nn.attention.SDPBackend; -1 stands for none that fits."""
PROMPT_TOKENS = 32


def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """The kernel that scaled_dot_product_attention takes for these arguments, which are its own; see NAMES."""
    import torch

    choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return NAMES.get(choice, "none")


def attention_backends(model: Any) -> dict[str, str]:
    """What the attention of a transformers model takes where it lives, in the floats that it computes in.

    prompt: for several tokens at once, a whole text of an encoder or the source of a translation. step: for one new token; not
    there for an encoder. Where layers differ, all are named, the most frequent first. A model that does without
    scaled_dot_product_attention is told by transformers' name of what it does instead, as 'eager'.
    """
    import torch

    own = str(getattr(model.config, "_attn_implementation", None) or "eager")
    found: dict[str, str] = {}
    with torch.inference_mode():
        for name, forward in _passes(model):
            with _listening() as heard:
                forward()
            found[name] = ", ".join(sorted(set(heard), key=lambda one: (-heard.count(one), one))) or own
    return found


def _passes(model: Any) -> Iterator[tuple[Pass, Any]]:
    """Forward passes of two short texts, as they are served: without padding, and a step with the cache of what came before."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    config = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS
    ids = _ids(model, min(PROMPT_TOKENS, most // 2))
    family, caches = family_of(config), [DynamicCache(config=config.get_text_config(decoder=True)) for _ in range(2)]
    if family == "causal":
        yield "prompt", lambda: model(ids, past_key_values=caches[0], use_cache=True)
        yield "step", lambda: model(ids[:, :1], past_key_values=caches[0], use_cache=True)
        return
    if family == "encoder":
        yield "prompt", lambda: forwarded(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return
    yield "prompt", lambda: model.get_encoder()(ids)
    encoded, cache = model.get_encoder()(ids), EncoderDecoderCache(*caches)
    step = {"encoder_outputs": encoded, "decoder_input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}
    model(**step)
    yield "step", lambda: model(**step)


def _ids(model: Any, tokens: int) -> Tensor:
    """Ids of two texts, int64 [2, tokens]; none of the first few, among which padding is."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(2 * tokens, device=model.device).reshape(2, tokens) % max(1, vocabulary - 4) + 4) % vocabulary


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The kernel of every call of scaled_dot_product_attention meanwhile."""
    from torch.nn.functional import scaled_dot_product_attention
    from torch.overrides import TorchFunctionMode

    heard: list[str] = []

    class Listening(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is scaled_dot_product_attention:
                heard.append(backend(*args, **(kwargs or {})))
            return function(*args, **(kwargs or {}))

    with Listening():
        yield heard


def kernels_of(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Of plain causal attention on a device, heads of 64: with as many keys as queries, and with one for four of them (GQA)."""
    import torch

    query = torch.zeros(1, 8, 128, 64, device=device, dtype=dtype)
    with torch.inference_mode():
        return {
            "alone": backend(query, query, query, is_causal=True),
            "grouped": backend(query, query[:, :2], query[:, :2], is_causal=True, enable_gqa=True),
        }
