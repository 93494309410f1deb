"""ONNX Runtime GenAI: log-probabilities and greedy generation from its own generator."""

from __future__ import annotations

import json
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.runtimes.generation_settings import LENGTHS, PROCESSED, GenerationSettings, chosen_text
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, by_length, windows_at_once
from featherweight.runtimes.onnx.pack import MODEL, WRITING
from featherweight.system.device import CPU, CUDA, Device

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


class GenaiModel(LoadedModel):
    """A folder of the model builder (genai_config.json, model.onnx); threads are ONNX Runtime's intra-op threads.

    GenAI always stops at an end token, which must be one of the vocabulary. Here nothing may stop it, so it is told that the
    last token, the rarest, is the end, and padding, which it passes over in prompts; where a text holds that one, or the model
    writes it, the one before it takes its place.

    Texts are written by a graph of its own, which computes of a prompt the last logits alone; it is loaded in the place of the one
    that scores, and that one in its place, so that the weights are held once.
    """

    spoilt: frozenset[int] = frozenset()
    follows = PROCESSED
    writing = True

    def load(self) -> None:
        import onnxruntime_genai

        described = json.loads((self.weights / "genai_config.json").read_text())["model"]
        self.vocabulary: int = described["vocab_size"]
        self.stopper = self.vocabulary - 1 - len(self.spoilt)
        config = onnxruntime_genai.Config(str(self.weights))
        config.overlay(json.dumps({"model": self._overlay()}))
        self.model: Any = onnxruntime_genai.Model(config)

    def served_on(self) -> Device:
        return CUDA if str(self.model.device_type).lower() == CUDA else CPU

    def _overlay(self) -> dict[str, Any]:
        # A single number replaces the file's end tokens; a list would be merged into theirs.
        session = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        graph = WRITING if self.writing and (self.weights / WRITING).is_file() else MODEL
        decoder = {"session_options": session, "filename": graph}
        return {"eos_token_id": self.stopper, "pad_token_id": self.stopper, "decoder": decoder}

    def unload(self) -> None:
        del self.model

    def _turn_to(self, writing: bool) -> None:
        """Load the graph that texts are written by, or the one that scores."""
        if writing == self.writing:
            return
        self.writing = writing
        if (self.weights / WRITING).is_file():
            self.set_threads(self.threads)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        import numpy

        self._turn_to(writing=False)
        scores: list[list[float]] = [[] for _ in windows]
        for batch in by_length(windows, windows_at_once(self.limits.max_tokens, self.vocabulary)):
            self._spare([windows[index] for index in batch])
            ids = numpy.array([windows[index] for index in batch], dtype=numpy.int32)
            for index, row in zip(batch, self._score(ids).tolist(), strict=True):
                scores[index] = row
        return scores

    def _score(self, ids: ndarray) -> ndarray:
        """[batch, tokens] -> log-probabilities of ids[:, 1:], float32 [batch, tokens - 1]."""
        import numpy

        generator = self._generator(*ids.shape)
        generator.append_tokens(ids)
        logits = generator.get_output("logits")[:, :-1].astype(numpy.float32, copy=False)
        chosen = numpy.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        top = logits.max(-1)
        # In place: the logits are by far the largest array here, and nobody needs them any more.
        numpy.exp(numpy.subtract(logits, top[..., None], out=logits), out=logits)
        return chosen - top - numpy.log(logits.sum(-1))

    def _spare(self, sequences: Tokens) -> None:
        """Take another stopper where one of the sequences holds it: GenAI would pass it over as padding."""
        while any(self.stopper in ids for ids in sequences):
            self._next_stopper()

    def _next_stopper(self) -> None:
        self.spoilt = self.spoilt | {self.stopper}
        if len(self.spoilt) == self.vocabulary:
            raise StageError("the texts hold every token of the vocabulary, so that none can serve as an end")
        self.set_threads(self.threads)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        self._turn_to(writing=True)
        while True:
            self._spare(prompts)
            tokens, timing = self._generate(prompts, new_tokens)
            if all(self.stopper not in row[:-1] and len(row) == new_tokens for row in tokens):
                return Generation(tokens, timing)
            self._next_stopper()

    def _generate(self, prompts: Tokens, new_tokens: int) -> tuple[Tokens, Timing]:
        """Greedy text, cut short where the model wrote the stopper."""
        import numpy

        tokens: Tokens = [[] for _ in prompts]
        began, first = perf_counter(), 0.0
        for batch in by_length(prompts, self.limits.max_batch):
            ids = numpy.array([prompts[index] for index in batch], dtype=numpy.int32)
            generator = self._generator(len(batch), ids.shape[1] + new_tokens)
            generator.append_tokens(ids)
            generator.generate_next_token()
            first = perf_counter() - began
            while not generator.is_done():
                generator.generate_next_token()
            for row, index in enumerate(batch):
                tokens[index] = generator.get_sequence(row)[ids.shape[1] :].tolist()
        return tokens, Timing(first, perf_counter() - began)

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """Greedy text by GenAI itself where only its end is asked for, else each token chosen here from GenAI's logits."""
        if set(settings.values) <= LENGTHS:
            return self.generate(prompts, new_tokens).tokens
        return [self._chosen(prompt, new_tokens, settings) for prompt in prompts]

    def _chosen(self, prompt: list[int], new_tokens: int, settings: GenerationSettings) -> list[int]:
        import torch

        self._turn_to(writing=True)
        self._spare([prompt])
        generator = self._generator(1, len(prompt) + new_tokens)

        def logits(unread: list[int]) -> Tensor:
            generator.append_tokens([unread])
            return torch.from_numpy(generator.get_logits()[:, -1].astype("float32"))

        return chosen_text(logits, prompt, new_tokens, settings)

    def _generator(self, batch: int, length: int) -> Any:
        """A greedy generator for `batch` sequences of `length` tokens in all."""
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self.model)
        # Greedy search draws no random numbers, yet without a seed GenAI asks the system for 624 of them: 12 ms a generator.
        parameters.set_search_options(batch_size=batch, max_length=length, do_sample=False, random_seed=1)
        return onnxruntime_genai.Generator(self.model, parameters)
