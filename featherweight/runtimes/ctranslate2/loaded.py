"""CTranslate2's generator or translator: one worker (inter_threads) or several, `threads` OpenMP threads inside each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from featherweight.runtimes.ctranslate2 import cublas
from featherweight.runtimes.ctranslate2.encoder import HEAD, Encoder
from featherweight.runtimes.ctranslate2.views import in_memory
from featherweight.runtimes.generation_settings import BEAMS, LENGTHS, GenerationSettings
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, alike, by_length, windows_at_once
from featherweight.runtimes.line import Line, side_by_side
from featherweight.system.device import CPU, CUDA, Device

SHARED, SOURCES, TARGETS = "shared_vocabulary.json", "source_vocabulary.json", "target_vocabulary.json"
"""Vocabularies of an encoder-decoder: one for both of its sides, or one each."""
ALONE = "vocabulary.json"
"""That of a decoder."""
FOLLOWED = LENGTHS | {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"}
FOLLOWED |= {"bad_words_ids", "suppress_tokens", "min_length", "min_new_tokens", "forced_bos_token_id"}
FOLLOWED |= BEAMS
PATIENCE = 4


def vocabulary(weights: Path, file: str) -> list[str]:
    """The tokens by id: those of SOURCES or TARGETS, which may be SHARED, or of a decoder ALONE."""
    path = weights / file
    found: list[str] = json.loads((path if path.exists() or file == ALONE else weights / SHARED).read_text())
    return found


class CTranslate2Model(LoadedModel):
    """A converted folder (model.bin, config.json, vocabularies). A seq2seq model has a vocabulary of sources and one of targets.

    options: `compute_type` (float32); `first_token`, the id that every target begins with, if any; `workers`, 1; `shortlist`, where
    texts are written in the tokens of a vocabulary map alone.
    """

    follows = FOLLOWED

    encoder: Encoder | None = None

    def load(self) -> None:
        import ctranslate2

        if self.device == CUDA:
            cublas.load()
        compute_type = self.options.get("compute_type", "float32")
        if (self.weights / HEAD).exists():
            most = self.limits.max_batch
            self.encoder = Encoder(self.weights, self.served, self.device, self.threads, compute_type, most)
            return
        self.seq2seq = (self.weights / SHARED).exists() or (self.weights / TARGETS).exists()
        self.vocabulary = vocabulary(self.weights, TARGETS if self.seq2seq else ALONE)
        self.sources = vocabulary(self.weights, SOURCES) if self.seq2seq else self.vocabulary
        self.first = json.loads((self.weights / "config.json").read_text()).get("bos_token")
        kind = ctranslate2.Translator if self.seq2seq else ctranslate2.Generator
        self.generator: Any = kind(
            str(self.weights),
            device=self.device,
            inter_threads=self.workers,
            intra_threads=self.threads,
            compute_type=compute_type,
        )

    @property
    def workers(self) -> int:
        """So many batches it writes at once."""
        return int(self.options.get("workers", "1"))

    def converse(self, line: Line) -> None:
        """Batches side by side, where there are several workers."""
        if self.workers == 1:
            super().converse(line)
        else:
            side_by_side(
                line,
                self.workers,
                lambda idle: line.next_batch(self.limits.max_batch, idle),
                lambda batch: self.write_batch(batch, line),
            )

    def served_on(self) -> Device:
        engine = self.encoder.encoder if self.encoder else self.generator
        return CUDA if engine.device == CUDA else CPU

    def unload(self) -> None:
        self.encoder = self.generator = None

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return self.encoder.outputs(ids, types) if self.encoder else super().outputs(ids, types)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        import numpy

        scores: list[list[float]] = [[] for _ in windows]
        most = windows_at_once(self.limits.max_tokens, len(self.vocabulary))
        for batch in by_length(windows, most):
            ids = numpy.array([windows[index] for index in batch], dtype=numpy.int32)
            every = in_memory(self.generator.forward_batch(ids[:, :-1].tolist(), return_log_probs=True))
            chosen = numpy.take_along_axis(every, ids[:, 1:, None], -1)[..., 0]
            for index, row in zip(batch, chosen.tolist(), strict=True):
                scores[index] = row
        return scores

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        """By the translator's own scoring, which starts the decoder itself and closes every target with the end token."""
        end = json.loads((self.weights / "config.json").read_text())["eos_token"]
        targets = [[self.vocabulary[token] for token in window[1:]] for window in windows]
        open_ended = [target[:-1] if target[-1] == end else target for target in targets]
        results = self.generator.score_batch(self._spelt(sources), open_ended, max_input_length=0, max_batch_size=1)
        return [result.log_probs[: len(target)] for result, target in zip(results, targets, strict=True)]

    def _spelt(self, sources: Tokens) -> list[list[str]]:
        return [[self.sources[token] for token in source] for source in sources]

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        if self.encoder:
            return self.encoder.time(prompts)
        if self.workers == 1 or len(prompts) == 1:
            return self._generate(prompts, new_tokens)
        began, share = perf_counter(), -(-len(prompts) // self.workers)
        parts = [prompts[start : start + share] for start in range(0, len(prompts), share)]
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(lambda part: self._generate(part, new_tokens), parts))
        first = max(one.timing.ttft_s for one in found)
        return Generation(list(chain.from_iterable(one.tokens for one in found)), Timing(first, perf_counter() - began))

    def _generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        """By one of its workers."""
        waiting, first, began = set(range(len(prompts))), 0.0, perf_counter()

        def seen(step: Any) -> bool:
            nonlocal first
            waiting.discard(step.batch_id)
            first = first or (0.0 if waiting else perf_counter() - began)
            return False

        write = self._translate if self.seq2seq else self._continue
        # Nothing ends a text; `min_length` would forbid the end token instead, and change the text.
        tokens = write(prompts, new_tokens, {"end_token": [], "beam_size": 1, "sampling_topk": 1, "callback": seen})
        total = perf_counter() - began
        return Generation(tokens, Timing(first or total, total))

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """By CTranslate2's own options. Sources go together whatever their lengths, which it pads and does not read; a decoder's
        prompts by their length: a shortest length counts the prompt, and of a longer one the rest is read token by token. So do the
        sources of a vocabulary map, whose tokens a batch has all in common.
        """
        write = self._translate if self.seq2seq else self._continue
        # The forced end takes the last place in each of the texts that are weighed against each other.
        weighed = {"forced_eos_token_id", "num_beams"} <= set(settings.values)
        new_tokens = max(1, new_tokens - weighed)
        tokens: Tokens = [[] for _ in prompts]
        together = self.seq2seq and "shortlist" not in self.options
        for batch in (alike if together else by_length)(prompts, self.limits.max_batch):
            some = [prompts[index] for index in batch]
            options = self._options(settings, 1 if self.seq2seq else len(some[0]), new_tokens)
            options |= {"num_hypotheses": options["beam_size"], "return_scores": True} if weighed else {}
            forced = self._forced(settings, some[0])
            rows = self._forced_on(forced, some, new_tokens, options) if forced else write(some, new_tokens, options)
            for index, row in zip(batch, rows, strict=True):
                tokens[index] = row
        return tokens

    def _forced(self, settings: GenerationSettings, prompt: list[int]) -> list[int]:
        """What a decoder's text begins with behind a prompt of one token, as transformers takes forced_bos_token_id."""
        token = settings.values.get("forced_bos_token_id")
        return [] if self.seq2seq or token is None or len(prompt) > 1 else [int(token)]

    def _forced_on(self, forced: list[int], prompts: Tokens, new_tokens: int, options: dict[str, Any]) -> Tokens:
        """The forced tokens, and what follows them unless they end the text."""
        if new_tokens <= len(forced) or forced[-1] in options["end_token"]:
            return [list(forced) for _ in prompts]
        options |= {"min_length": max(0, options["min_length"] - len(forced))}
        rows = self._continue([prompt + forced for prompt in prompts], new_tokens - len(forced), options)
        return [forced + row for row in rows]

    def _options(self, settings: GenerationSettings, prompt: int, new_tokens: int) -> dict[str, Any]:
        values = settings.values
        share = min(values.get("top_p", 1.0), 1.0)
        sampled = {"sampling_topk": values.get("top_k", 50), "sampling_topp": share} if share > 0 else {"sampling_topk": 1}
        sampled |= {"sampling_temperature": values.get("temperature", 1.0)}
        ends = settings.ends
        words = [word for word in values.get("bad_words_ids", []) if word not in [[end] for end in ends]]  # an end is no word
        words += [[token] for token in values.get("suppress_tokens", [])]
        words = [word for word in words if min(word) >= 0 and max(word) < len(self.vocabulary)]  # others are never written
        shortest = max(values.get("min_length", 0) - prompt, values.get("min_new_tokens", 0))
        return {
            "end_token": ends,
            "return_end_token": True,  # counted in the lengths that a search of several texts chooses by
            "beam_size": values.get("num_beams", 1),
            "length_penalty": values.get("length_penalty", 1.0),
            # transformers goes on until nothing better can come; CTranslate2 until it has so many times the beams.
            "patience": 1 if values.get("early_stopping") is True else PATIENCE,
            "repetition_penalty": values.get("repetition_penalty", 1.0),
            "no_repeat_ngram_size": values.get("no_repeat_ngram_size", 0),
            "suppress_sequences": [[self.vocabulary[token] for token in word] for word in words] or None,
            ("min_decoding_length" if self.seq2seq else "min_length"): min(max(0, shortest), new_tokens),
            **(sampled if values.get("do_sample") else {"sampling_topk": 1}),
        }

    def _continue(self, prompts: Tokens, new_tokens: int, options: dict[str, Any]) -> Tokens:
        starts = [[self.vocabulary[token] for token in prompt] for prompt in prompts]
        # Penalties see the prompt only where it is written token by token, which takes as many steps more.
        whole = options.get("repetition_penalty", 1.0) != 1.0 or options.get("no_repeat_ngram_size", 0) > 0
        options |= {"max_length": new_tokens + whole * (len(prompts[0]) - 1), "include_prompt_in_result": whole}
        results = self.generator.generate_batch(starts, **options)
        begun = [whole * (len(start) - (start[0] == self.first)) for start in starts]  # it does not give its own first token back
        rows = [result.sequences_ids[_best(result.sequences_ids, result, options)] for result in results]
        return [list(row)[count:] for count, row in zip(begun, rows, strict=True)]

    def _translate(self, prompts: Tokens, new_tokens: int, options: dict[str, Any]) -> Tokens:
        ids = {token: index for index, token in enumerate(self.vocabulary)}
        forced = self.options.get("first_token")
        prefix = None if forced is None else [[self.vocabulary[int(forced)]]] * len(prompts)
        options |= {"max_decoding_length": new_tokens, "max_input_length": 0, "target_prefix": prefix}
        options |= {"use_vmap": "shortlist" in self.options}
        results = self.generator.translate_batch(self._spelt(prompts), **options)
        rows = [[[ids[token] for token in one] for one in result.hypotheses] for result in results]
        return [found[_best(found, result, options)][:new_tokens] for found, result in zip(rows, results, strict=True)]


def _best(found: Tokens, result: Any, options: dict[str, Any]) -> int:
    """Place of the likeliest of several texts, each to the power of its length: one that has not ended gets a forced end more."""
    power, ends = options.get("length_penalty", 1.0), options["end_token"]

    def weight(place: int) -> float:
        length = len(found[place])
        return float(result.scores[place]) * (length / (length + (found[place][-1:] not in [[end] for end in ends]))) ** power

    return max(range(len(found)), key=weight) if len(found) > 1 else 0
