"""torch.compile (Inductor): the decode step as one compiled graph over a static key-value cache; prefill stays eager.

An encoder's one pass is a graph as a whole. On a GPU the step is replayed as a CUDA graph, for there starting its kernels one by
one takes longer than they run.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import task_of
from featherweight.model.heads import forwarded, read_states, states
from featherweight.model.positions import AFTER_PADDING
from featherweight.runtimes.torch.eager import TorchModel
from featherweight.spec import HEADED
from featherweight.system.device import CUDA

if TYPE_CHECKING:
    from torch import Tensor

# Static caches come in lengths of a multiple of this, so that neighbouring lengths share a graph.
STEP = 128
MASKED = ("biogpt", "bloom", "falcon", "opt")
"""Model types that make a mask where none is given, as long as the text so far, which no graph knows, or ALiBi has not."""


class CompiledTorchModel(TorchModel):
    """One graph per batch size, length (of the cache, or of an encoder's text) and number of threads, made when first needed."""

    def load(self) -> None:
        import torch

        super().load()
        torch._dynamo.config.recompile_limit = 64
        self.caches: dict[tuple[int, int], Any] = {}
        counts = self.model.config.model_type in AFTER_PADDING  # its positions itself
        self.placed = not counts and "position_ids" in inspect.signature(self.model.forward).parameters
        replayed = "reduce-overhead" if self.served_on() == CUDA else None
        self.step = torch.compile(self._next, dynamic=False, fullgraph=True, mode=replayed)
        self.read = torch.compile(self._likeliest, dynamic=False, fullgraph=True)
        self.label = torch.compile(self._states, dynamic=True)

    def attention(self) -> dict[str, str]:
        """Not asked: a graph is given other masks than the modules that it was made of."""
        return {}

    def _greedy(self, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            cache = self._cache(ids.shape[0], ids.shape[1] + new_tokens)
            places = torch.arange(ids.shape[1] + new_tokens, device=ids.device)[None]
            mask = self._mask(ids, cache)
            read, ids = ids.shape[1], self._next(ids.clone(), places[:, : ids.shape[1]], mask, cache)
            first, new = self._now(), [ids]
            for place in range(read, read + new_tokens - 1):
                # where a CUDA graph writes, the next step writes again
                ids = self.step(ids, places[:, place : place + 1].clone(), mask, cache).clone()
                new.append(ids)
            return torch.cat(new, dim=1), first

    def _mask(self, ids: Tensor, cache: Any) -> Tensor | None:
        """That no place of the cache is padding, for those who else ask the host how many have been read."""
        if self.model.config.model_type not in MASKED:
            return None
        return ids.new_ones(ids.shape[0], cache.get_max_cache_shape())

    def _next(self, ids: Tensor, places: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The likeliest next token of each sequence, [batch, 1]; appends the keys and values of `ids` to the cache.

        places: of `ids` in the text, [1, tokens]. Who takes them is told them: CTRL else counts them on the host, and Bamba anew at
        each step.
        """
        told = {"position_ids": places.expand_as(ids)} if self.placed else {}
        told |= {} if mask is None else {"attention_mask": mask}
        logits = self.model(ids, **told, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _fill(self, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        import torch

        if task_of(self.model.config) in HEADED:
            return super()._fill(ids, new_tokens)

        with torch.inference_mode(False), torch.no_grad():
            return self.read(ids.clone()), self._now()

    def _answers(self, inputs: dict[str, Tensor]) -> Tensor:
        """One graph for texts of all lengths; what is made of its states is not in it, which may be read from files."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            told = {name: tensor.clone() for name, tensor in inputs.items()}
            return read_states(self.model.config, self.label(told), told)

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        return states(self.model.config, forwarded(self.model, inputs))

    def _cache(self, batch: int, tokens: int) -> Any:
        """An empty static cache for `batch` sequences of `tokens`, the same object each time: a graph is tied to it."""
        from transformers import StaticCache

        length = min(-(-tokens // STEP) * STEP, self.limits.max_tokens)
        if (batch, length) not in self.caches:
            self.caches[batch, length] = StaticCache(config=self.model.config, max_cache_len=length)
        cache = self.caches[batch, length]
        cache.reset()
        return cache
