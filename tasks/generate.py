"""generate: text that a teacher writes, for students to learn from (sequence-level distillation, Kim and Rush 2016).

CTranslate2 writes several times faster than PyTorch. It takes over where it knows the architecture and scores its own text as
PyTorch does; everything else PyTorch writes itself.
"""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.spec import GenerateSpec
from featherweight.errors import RecipeError, StageError, ToolchainError
from featherweight.model.architecture import Family, family_of, task_of
from featherweight.model.parent import Parent
from featherweight.progress import Metrics, Progress
from featherweight.runtimes.ctranslate2 import cublas, pack
from featherweight.system.device import CUDA, current
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import decoder_start, token_pairs
from featherweight.text.tokens import token_windows
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = list[list[int]]
BATCH = 32
COMPARED = 4
"""Texts that both engines score."""
BOUND_NATS = 0.02
"""How far their log-probabilities of a token may lie apart. Float32 engines differ by 1e-4."""


class Writer(Protocol):
    """An engine that goes on from prompts, or answers sources, and scores what was written."""

    def write(self, prompts: Tokens) -> Tokens: ...

    def score(self, prompt: list[int], written: list[int]) -> list[float]: ...


@stage("generate", version="1", libraries=("ctranslate2", "torch", "transformers"), native=True)
def generate(
    spec: GenerateSpec, *, checkpoint: Path, text: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Write a text folder of what `checkpoint` writes: on from the beginnings of documents of `text`, or as their targets.

    Metrics: `documents`, `tokens`, `tokens_per_s`, `by_ctranslate2` (1 where that engine wrote, 0 where PyTorch did).
    Raises RecipeError for an encoder, DataError for too little text.
    """
    config, tokenizer = opening.load_config(checkpoint), load_tokenizer(checkpoint)
    family = family_of(config)
    if reason := spec.refusal(Parent(task_of(config), config.model_type)):
        raise RecipeError(reason)
    prompts = _prompts(spec, family, text, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        writer = _writer(spec, checkpoint, family, Path(folder), prompts, seed, progress)
        began, written = time.perf_counter(), []
        for start in range(0, len(prompts), BATCH):
            written += writer.write(prompts[start : start + BATCH])
            progress.step(len(written), len(prompts))
        seconds = time.perf_counter() - began
    write_documents(out, _documents(family, prompts, written, tokenizer))
    tokens = sum(len(ids) for ids in written)
    fast = isinstance(writer, CTranslate2Writer)
    return {"documents": len(written), "tokens": tokens, "tokens_per_s": tokens / seconds, "by_ctranslate2": float(fast)}


def _prompts(spec: GenerateSpec, family: Family, text: Path, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Beginnings of documents, or whole sources."""
    if family == "seq2seq":
        return [source for source, _ in islice(token_pairs(text, tokenizer, spec.sequence), spec.samples)]
    return [window.ids for window in token_windows(text, tokenizer, spec.prompt_tokens, spec.samples)]


def _documents(family: Family, prompts: Tokens, written: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    pairs = enumerate(zip(prompts, written, strict=True))
    if family == "seq2seq":
        return [Document(f"generated/{place}", text(prompt), text(answer)) for place, (prompt, answer) in pairs]
    return [Document(f"generated/{place}", text(prompt + answer)) for place, (prompt, answer) in pairs]


def _writer(
    spec: GenerateSpec, checkpoint: Path, family: Family, folder: Path, prompts: Tokens, seed: int, progress: Progress
) -> Writer:
    """The fast engine where it can be had and agrees with PyTorch, else PyTorch."""
    slow = TorchWriter(opening.load_model(checkpoint), family, spec, seed)
    try:
        pack.convert(slow.model, checkpoint, folder / "ctranslate2", None)
        fast = CTranslate2Writer(folder / "ctranslate2", load_tokenizer(checkpoint), family, spec, seed)
        require_agreement(slow, fast, prompts[:COMPARED])
    except (StageError, ToolchainError) as refusal:
        progress.note(f"PyTorch writes: {refusal}")
        return slow
    return CTranslate2Writer(folder / "ctranslate2", load_tokenizer(checkpoint), family, spec, seed)


def require_agreement(reference: Writer, fast: Writer, prompts: Tokens) -> None:
    """Raise StageError where the two engines give other log-probabilities to what the fast one writes."""
    try:
        written = fast.write(prompts)
        scores = [fast.score(prompt, answer) for prompt, answer in zip(prompts, written, strict=True)]
    except RuntimeError as error:  # such as a library of CUDA that it loads when it first computes
        raise StageError(f"CTranslate2 does not compute here: {' '.join(str(error).split())}") from error
    for prompt, answer, ours in zip(prompts, written, scores, strict=True):
        apart = max((abs(a - b) for a, b in zip(ours, reference.score(prompt, answer), strict=True)), default=0.0)
        if not apart <= BOUND_NATS:
            raise StageError(f"CTranslate2's log-probabilities are up to {apart:.3g} nats off PyTorch's")


class CTranslate2Writer:
    """CTranslate2 in float32. A new one begins its random numbers anew."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, family: Family, spec: GenerateSpec, seed: int) -> None:
        import ctranslate2
        import torch

        ctranslate2.set_random_seed(seed)
        engine = ctranslate2.Translator if family == "seq2seq" else ctranslate2.Generator
        self.tokenizer: Any = tokenizer
        self.spec = spec
        if current() == CUDA:
            cublas.load()
        try:
            self.engine: Any = engine(str(folder), device=current(), compute_type="float32", intra_threads=torch.get_num_threads())
        except (ValueError, RuntimeError) as error:
            raise StageError(f"CTranslate2 does not load the model: {' '.join(str(error).split())}") from error
        self.translates = family == "seq2seq"

    def write(self, prompts: Tokens) -> Tokens:
        spec, starts = self.spec, [self.tokenizer.convert_ids_to_tokens(ids) for ids in prompts]
        how: dict[str, Any] = {"beam_size": spec.beams, "sampling_topk": 1 if spec.temperature is None else 0}
        how |= {"sampling_temperature": spec.temperature or 1.0}
        if self.translates:
            results = self.engine.translate_batch(starts, max_decoding_length=spec.sequence, **how)
            return [self.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        most = spec.sequence - spec.prompt_tokens
        results = self.engine.generate_batch(starts, max_length=most, include_prompt_in_result=False, **how)
        return [list(result.sequences_ids[0]) for result in results]

    def score(self, prompt: list[int], written: list[int]) -> list[float]:
        """Natural-log probabilities of the written tokens."""
        if not written:
            return []
        start, tokens = (self.tokenizer.convert_ids_to_tokens(ids) for ids in (prompt, written))
        if self.translates:
            return list(self.engine.score_batch([start], [tokens])[0].log_probs)[: len(written)]
        return list(self.engine.score_batch([start + tokens])[0].log_probs)[-len(written) :]


class TorchWriter:
    """transformers' own generation."""

    def __init__(self, model: PreTrainedModel, family: Family, spec: GenerateSpec, seed: int) -> None:
        self.model: Any = model
        self.translates, self.spec, self.seed = family == "seq2seq", spec, seed

    def write(self, prompts: Tokens) -> Tokens:
        return [self._write(prompt) for prompt in prompts]

    def _write(self, prompt: list[int]) -> list[int]:
        import torch

        spec, ids = self.spec, self._ids(prompt)
        how: dict[str, Any] = {"num_beams": spec.beams, "do_sample": spec.temperature is not None}
        how |= {"temperature": spec.temperature, "top_k": 0, "top_p": 1.0} if spec.temperature is not None else {}
        most = spec.sequence if self.translates else spec.sequence - spec.prompt_tokens
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + len(prompt) + sum(prompt))
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **how)
        written = found[0].tolist()[1 if self.translates else len(prompt) :]
        ends = self.model.generation_config.eos_token_id
        return [token for token in written if token not in (ends if isinstance(ends, list) else [ends])]

    def score(self, prompt: list[int], written: list[int]) -> list[float]:
        """Natural-log probabilities of the written tokens."""
        import torch

        with torch.inference_mode():
            if self.translates:
                decoder = self._ids([decoder_start(self.model.config), *written[:-1]])
                logits = self.model(input_ids=self._ids(prompt), decoder_input_ids=decoder).logits[0]
            else:
                logits = self.model(self._ids(prompt + written)).logits[0, len(prompt) - 1 : -1]
        scores = logits[: len(written)].float().log_softmax(-1)
        return scores.gather(1, self._ids(written).T).squeeze(1).tolist()

    def _ids(self, ids: list[int]) -> Tensor:
        """[1, tokens], beside the model."""
        import torch

        return torch.tensor([ids], dtype=torch.long, device=self.model.device)
