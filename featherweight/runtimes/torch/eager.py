"""PyTorch eager, SDPA where the model has it, key-value cache: in float32 the baseline, as fast as transformers itself makes it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.kept_adapters import beside, kept_adapters
from featherweight.errors import StageError
from featherweight.model.architecture import attention_options, auto_class, family_of, task_of
from featherweight.model.decoding import Reading
from featherweight.model.heads import answers, takes_types
from featherweight.model.positions import crosses_switch, rotary_switch
from featherweight.runtimes.batched import answered
from featherweight.runtimes.generation_settings import EVERYTHING, GenerationSettings
from featherweight.runtimes.interface import (
    Generation,
    LoadedModel,
    Timing,
    Tokens,
    by_length,
    by_shape,
    windows_at_once,
)
from featherweight.spec import HEADED
from featherweight.system import device
from featherweight.text.examples import packed_inputs
from featherweight.text.model_inputs import IGNORED, decoder_prefix, window_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


ONE_TEXT = {"num_return_sequences": 1, "return_dict_in_generate": False} | dict.fromkeys(
    ("prompt_lookup_num_tokens", "speculation_type", "use_mtp", "assistant_early_exit", "cache_implementation")
)
"""What of a checkpoint's settings is about how many texts come back, in what form and how fast: here a text for each prompt.

Guessing ahead and other caches write the same text, the former one at a time only.
"""


class TorchModel(LoadedModel):
    """transformers' own model in a greedy loop without the bookkeeping of `.generate` (never slower than it).

    options: `dtype`, float32 unless told otherwise. `bitsandbytes`, 'nf4' or 'llm.int8', rounds the weights at load and
    computes in float16 on a CUDA GPU.

    A GPU's kernels run behind the calls that start them, so that the clock is read when they are done (`_now`).
    """

    follows = EVERYTHING

    def load(self) -> None:
        import torch
        from transformers import AutoConfig

        torch.set_num_threads(self.threads)
        self._adapters: Callable[[str | None], None] | None = None
        rounded = self.options.get("bitsandbytes")
        config = AutoConfig.from_pretrained(self.weights, local_files_only=True)
        model: Any = auto_class(config).from_pretrained(
            self.weights,
            local_files_only=True,
            **attention_options(config),
            **_bitsandbytes(rounded) if rounded else {"dtype": getattr(torch, self.options.get("dtype", "float32"))},
        )
        self.model = (model if rounded else device.place(model, self.device)).eval()

    def adapt(self, name: str | None) -> None:
        """The layers that peft puts in are there from the first time on that an adapter is asked for."""
        kept = kept_adapters(self.weights)
        if name is not None and name not in kept:
            raise StageError(f"no adapter {name} lies beside this model")
        if self._adapters is None and name is not None:
            self._adapters = beside(self.model, kept)
        if self._adapters is not None:
            self._adapters(name)

    def served_on(self) -> device.Device:
        return device.CUDA if self.model.device.type == device.CUDA else device.CPU

    def peak_tensor_bytes(self) -> int | None:
        return device.peak_bytes(self.model.device)

    def _now(self) -> float:
        device.synchronize(self.model.device)
        return perf_counter()

    def attention(self) -> dict[str, str]:
        from featherweight.runtimes.torch.attention_backend import attention_backends

        return attention_backends(self.model)

    def set_threads(self, threads: int) -> None:
        import torch

        self.threads = threads
        torch.set_num_threads(threads)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return self.logprobs_given(windows, [[] for _ in windows])

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        import torch

        scores: list[list[float]] = [[] for _ in windows]
        most = windows_at_once(self.limits.max_tokens, self.model.config.get_text_config().vocab_size)
        with torch.inference_mode():
            for batch in by_shape(windows, sources, most):
                ids, source = (self._batch(rows, batch) for rows in (windows, sources))
                for index, row in zip(batch, self._score(ids, source), strict=True):
                    scores[index] = row
        return scores

    def _batch(self, rows: Tokens, batch: list[int]) -> Tensor:
        import torch

        return torch.tensor([rows[index] for index in batch], device=self.model.device)

    def _score(self, ids: Tensor, source: Tensor) -> list[list[float]]:
        """Log-probabilities of what is to be predicted in each of some windows of one shape."""
        inputs, labels = window_inputs(self.model.config, ids, source)
        logits = self.model(**inputs).logits.float()
        chosen = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        scores = chosen - logits.logsumexp(-1)
        return [row[wanted != IGNORED].tolist() for row, wanted in zip(scores, labels, strict=True)]

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        import torch

        with torch.inference_mode():
            return answered(self.model.config, self.limits.max_batch, ids, types, self._packed)

    def _packed(self, ids: Tokens, types: Tokens) -> Tensor:
        inputs = packed_inputs(self.model.config, ids, types)
        return self._answers({name: tensor.to(self.model.device) for name, tensor in inputs.items()}).float()

    def _answers(self, inputs: dict[str, Tensor]) -> Tensor:
        return answers(self.model, inputs)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        import torch

        tokens: Tokens = [[] for _ in prompts]
        run = {"causal": self._greedy, "seq2seq": self._translate, "encoder": self._fill}[family_of(self.model.config)]
        began, firsts = self._now(), 0.0
        with torch.inference_mode():
            for batch in by_length(prompts, self.limits.max_batch):
                new, first = run(self._batch(prompts, batch), new_tokens)
                firsts = first - began
                for index, row in zip(batch, new.tolist(), strict=True):
                    tokens[index] = row
        return Generation(tokens, Timing(firsts, self._now() - began))

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """By transformers' own `generate`, several prompts of one length at once."""
        import torch

        tokens: Tokens = [[] for _ in prompts]
        ends = settings.ends
        options = settings.values | {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
        options |= ONE_TEXT | {"num_beams": settings.values.get("num_beams", 1)}
        with torch.inference_mode():
            for batch in by_length(prompts, self.limits.max_batch):
                ids = self._batch(prompts, batch)
                options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "max_length": None}
                options["use_cache"] = not crosses_switch(self.model.config, ids.shape[1], new_tokens)
                found = self.model.generate(ids, **options)
                behind = 1 if family_of(self.model.config) == "seq2seq" else ids.shape[1]
                for index, row in zip(batch, found[:, behind:].tolist(), strict=True):
                    tokens[index] = row
        return tokens

    def _greedy(self, ids: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """[batch, prompt] -> ([batch, new_tokens], the moment at which the first of them was there)."""
        import torch

        switch, prompt = rotary_switch(self.model.config), ids
        reading = Reading(self.model)
        ids = reading.next(ids).argmax(-1, keepdim=True)
        first, new = self._now(), [ids]
        for _ in range(new_tokens - 1):
            if prompt.shape[1] + len(new) - 1 == switch:  # the keys of all positions are others from here on
                ids, reading = torch.cat([prompt, *new], dim=1), Reading(self.model)
            ids = reading.next(ids).argmax(-1, keepdim=True)
            new.append(ids)
        return torch.cat(new, dim=1), first

    def _translate(self, source: Tensor, new_tokens: int) -> tuple[Tensor, float]:
        """The same for the decoder of a seq2seq model: the source is encoded once, and its keys and values are kept."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        prefix = torch.tensor([decoder_prefix(self.model)], device=source.device).repeat(len(source), 1)
        encoded = self.model.get_encoder()(source)
        cache = EncoderDecoderCache(DynamicCache(config=self.model.config), DynamicCache(config=self.model.config))
        ids = self._next_target(prefix, encoded, cache)
        first, new = self._now(), [prefix[:, 1:], ids]
        for _ in range(new_tokens - prefix.shape[1]):
            ids = self._next_target(ids, encoded, cache)
            new.append(ids)
        return torch.cat(new, dim=1)[:, :new_tokens], first

    def _next_target(self, ids: Tensor, encoded: Any, cache: Any) -> Tensor:
        """The likeliest next token of each target, [batch, 1]."""
        logits = self.model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def _fill(self, ids: Tensor, _: int) -> tuple[Tensor, float]:
        """The likeliest token at every position, int64 [batch, tokens]; none where vectors or labels are answered."""
        if task_of(self.model.config) in HEADED:
            self._answers(_alone(self.model.config, ids))
            return ids[:, :0], self._now()
        return self._likeliest(ids), self._now()

    def _likeliest(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits.argmax(-1)


def _alone(config: PreTrainedConfig, ids: Tensor) -> dict[str, Tensor]:
    """Inputs of texts of one length, ids [batch, tokens]."""
    import torch

    types = {"token_type_ids": torch.zeros_like(ids)} if takes_types(config) else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def _bitsandbytes(rounded: str) -> dict[str, Any]:
    """Options of from_pretrained for 4-bit NormalFloat (Dettmers et al. 2023) or LLM.int8 (Dettmers et al. 2022)."""
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
    config = BitsAndBytesConfig(**nf4 if rounded == "nf4" else {"load_in_8bit": True})
    return {"quantization_config": config, "dtype": torch.float16, "device_map": {"": 0}}
