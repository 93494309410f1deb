"""Graphs that Optimum exported, in this environment's ONNX Runtime: a session each, keys and values bound and never copied."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import generation_config, load_config
from featherweight.model.architecture import family_of, task_of
from featherweight.model.heads import read
from featherweight.runtimes.batched import answered, label_logprobs, scored
from featherweight.runtimes.generation_settings import LENGTHS, PROCESSED, GenerationSettings, chosen_text
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, by_length
from featherweight.spec import HEADED
from featherweight.system.device import CPU, CUDA, Device
from featherweight.text.examples import packed_inputs
from featherweight.text.model_inputs import decoder_start

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

ENCODER, DECODER, STEP, MODEL = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx"
PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}


class OptimumModel(LoadedModel):
    """A folder of one graph, or of an encoder and its decoder without and with a past; threads are intra-op threads."""

    follows = PROCESSED

    def load(self) -> None:
        self.config: Any = load_config(self.served)
        self.family = family_of(self.config)
        names = (ENCODER, DECODER, STEP) if self.family == "seq2seq" else (MODEL,)
        self.graphs = {name: _Graph(self._session(name), self.device) for name in names}
        forced = getattr(generation_config(self.served), "forced_bos_token_id", None)
        self.prefix = [decoder_start(self.config)] if self.family == "seq2seq" else []
        self.prefix += [int(forced)] if self.prefix and forced is not None else []

    def _session(self, name: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        return onnxruntime.InferenceSession(str(self.weights / name), options, providers=[PROVIDERS[self.device]])

    def unload(self) -> None:
        self.graphs = {}

    def served_on(self) -> Device:
        graph = next(iter(self.graphs.values()))
        return CUDA if graph.session.get_providers()[0] == PROVIDERS[CUDA] else CPU

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return self.logprobs_given(windows, [[] for _ in windows])

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        return scored(self.config, self.limits.max_tokens, windows, sources, self._score)

    def _score(self, inputs: Mapping[str, Any], labels: Tensor) -> list[list[float]]:
        import torch

        return label_logprobs(torch.from_numpy(self._logits(inputs)).float(), labels)

    def _logits(self, inputs: Mapping[str, Tensor]) -> ndarray:
        """Logits of whole windows, [batch, positions, vocabulary]."""
        ids = inputs["input_ids"].numpy()
        if self.family == "seq2seq":
            encoded = self._encode(ids)
            return self.graphs[DECODER](input_ids=inputs["decoder_input_ids"].numpy(), **encoded)["logits"].numpy()
        return self._read(ids)["logits"].numpy()

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return answered(self.config, self.limits.max_batch, ids, types, self._answers)

    def _answers(self, ids: Tokens, types: Tokens) -> Tensor:
        import torch
        from transformers.modeling_outputs import ModelOutput

        inputs = packed_inputs(self.config, ids, types)
        places = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]).contiguous()  # which decoders are told
        found = self.graphs[MODEL](position_ids=places.numpy(), **{name: tensor.numpy() for name, tensor in inputs.items()})
        tensors = {name: torch.from_numpy(value.numpy()) for name, value in found.items()}
        return read(self.config, ModelOutput(tensors), inputs)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        import numpy

        tokens: Tokens = [[] for _ in prompts]
        began, first = perf_counter(), 0.0
        for batch in by_length(prompts, self.limits.max_batch):
            some = numpy.array([prompts[index] for index in batch], dtype=numpy.int64)
            new, moment = self._greedy(some, new_tokens) if self.family != "encoder" else self._fill(some)
            first = moment - began
            for index, row in zip(batch, new.tolist(), strict=True):
                tokens[index] = row
        return Generation(tokens, Timing(first, perf_counter() - began))

    def _fill(self, ids: ndarray) -> tuple[ndarray, float]:
        """The likeliest token at every position; none where vectors or labels are answered."""
        if task_of(self.config) in HEADED:
            self._answers(ids.tolist(), [[0] * ids.shape[1]] * len(ids))
            return ids[:, :0], perf_counter()
        return self._read(ids)["logits"].numpy().argmax(-1), perf_counter()

    def _greedy(self, prompts: ndarray, new_tokens: int) -> tuple[ndarray, float]:
        """[batch, prompt] -> ([batch, new_tokens], the moment at which the first of them was there)."""
        import numpy

        steps = self._steps(prompts)
        new = [steps.ids[:, 1:]] if self.family == "seq2seq" else []
        written = len(self.prefix) - 1 if self.family == "seq2seq" else 0
        first = 0.0
        for _ in range(max(1, new_tokens - written)):
            chosen = steps.logits().argmax(-1)[:, None]
            first = first or perf_counter()
            new.append(chosen)
            steps.ids = chosen
        return numpy.concatenate(new, axis=1)[:, :new_tokens], first

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """Greedy text where only its end is asked for, else each token chosen by transformers' own processors of logits."""
        if set(settings.values) <= LENGTHS | ({"forced_bos_token_id"} if self.family == "seq2seq" else set()):
            return self.generate(prompts, new_tokens).tokens
        return [self._chosen(prompt, new_tokens, settings) for prompt in prompts]

    def _chosen(self, prompt: list[int], new_tokens: int, settings: GenerationSettings) -> list[int]:
        import numpy
        import torch

        steps = self._steps(numpy.array([prompt], dtype=numpy.int64))

        def logits(unread: list[int]) -> Tensor:
            steps.ids = numpy.array([unread], dtype=numpy.int64)
            return torch.from_numpy(steps.logits()).float()

        return chosen_text(logits, self.prefix[:1] if self.family == "seq2seq" else prompt, new_tokens, settings)

    def _steps(self, prompts: ndarray) -> _Steps:
        import numpy

        if self.family == "causal":
            return _Steps(self.graphs[MODEL], self.graphs[MODEL], prompts, {})
        start = numpy.array([self.prefix] * len(prompts), dtype=numpy.int64)
        return _Steps(self.graphs[DECODER], self.graphs[STEP], start, self._encode(prompts))

    def _encode(self, ids: ndarray) -> dict[str, Any]:
        """What a decoder is told of its source: the encoder's hidden states, and that none of it is padding."""
        import numpy

        mask = numpy.ones_like(ids)
        hidden = self.graphs[ENCODER](input_ids=ids, attention_mask=mask)["last_hidden_state"]
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def _read(self, ids: ndarray) -> dict[str, Any]:
        """One pass over unpadded texts of one length."""
        import numpy

        places = numpy.broadcast_to(numpy.arange(ids.shape[1]), ids.shape).copy()
        told = {"attention_mask": numpy.ones_like(ids), "position_ids": places, "token_type_ids": numpy.zeros_like(ids)}
        return self.graphs[MODEL](input_ids=ids, **told)


class _Steps:
    """A decoder that reads on token by token: `ids` are what it reads next, int64 [batch, tokens].

    The first pass reads `ids` without a past, by the graph `whole`; all others by `step`. Keys and values that one pass leaves are
    bound as the next one's; those of a source stay what the first left.
    """

    def __init__(self, whole: _Graph, step: _Graph, ids: ndarray, source: Mapping[str, Any]) -> None:
        self.whole, self.step, self.ids, self.source = whole, step, ids, source
        self.past: dict[str, Any] = {}
        self.read = 0

    def logits(self) -> ndarray:
        """Of the token behind `ids`: float32 [batch, vocabulary]."""
        graph = self.step if self.past else self.whole
        found = graph(input_ids=self.ids, **self.source, **self._places(), **self.past)
        self.read += self.ids.shape[1]
        self.past |= {_past(name): value for name, value in found.items() if name.startswith("present")}
        logits: ndarray = found["logits"].numpy()[:, -1]
        return logits

    def _places(self) -> dict[str, ndarray]:
        """Mask and positions, which a decoder alone is told."""
        import numpy

        if self.source:
            return {}
        batch, tokens = self.ids.shape
        positions = numpy.arange(self.read, self.read + tokens, dtype=numpy.int64)
        mask = numpy.ones((batch, self.read + tokens), dtype=numpy.int64)
        return {"attention_mask": mask, "position_ids": numpy.broadcast_to(positions, (batch, tokens)).copy()}


def _past(name: str) -> str:
    """The input that an output of keys or values becomes at the next pass."""
    return name.replace("present", "past_key_values", 1)


class _Graph:
    """A session, called by the names of its inputs with arrays or values of earlier calls; its outputs stay where they are made.

    What a graph does not read is left out; a past that it is not given is empty.
    """

    def __init__(self, session: Any, device: Device) -> None:
        self.session, self.device = session, device
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]

    def __call__(self, **values: Any) -> dict[str, Any]:
        binding = self.session.io_binding()
        batch = len(values["input_ids"]) if "input_ids" in values else 1
        for name, one in self.inputs.items():
            value = values[name] if name in values else self._nothing(one, batch)
            if hasattr(value, "shape") and not callable(value.shape):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def _nothing(self, one: Any, batch: int) -> Any:
        """Keys or values of no position, [batch, heads, 0, width]."""
        import numpy

        if not one.name.startswith("past_key_values"):
            raise KeyError(f"the graph reads '{one.name}', which nothing here gives it")
        _, heads, _, width = one.shape
        return numpy.zeros((batch, heads, 0, width), dtype=numpy.float32)
