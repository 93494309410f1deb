"""llama.cpp, loaded: log-probabilities of every position, and texts that are written as places become free."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes import c_float, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from featherweight.checkpoint.kept_adapters import kept_adapters
from featherweight.checkpoint.opening import load_config
from featherweight.errors import StageError
from featherweight.runtimes.batched import answered
from featherweight.runtimes.generation_settings import LENGTHS, PROCESSED, GenerationSettings, chooser
from featherweight.runtimes.interface import Acceptance, Generation, LoadedModel, Timing, Tokens
from featherweight.runtimes.line import ENDLESSLY, NOW, Ask, Line
from featherweight.runtimes.llama_cpp import library
from featherweight.runtimes.llama_cpp.adapter_files import FILE as ADAPTER_FILE
from featherweight.runtimes.llama_cpp.answers import Answering
from featherweight.runtimes.llama_cpp.draft import AT_ONCE, Draft, Entry
from featherweight.runtimes.speculation import DRAFT, Repetitions, next_draft_tokens, speculation_of
from featherweight.store.served_folder import Serving

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

ROWS = 64
"""Positions whose logits are computed at once where all are wanted: of more, the logits would take more than the weights."""
PADDED = 256
"""llama.cpp keeps room for sequences of multiples of this."""


@dataclass(eq=False)
class Place:
    """A sequence being written, up to an end or to `new_tokens` new ones: all its tokens, and how many of them were computed.

    drafted: tokens that are computed behind its own in this pass; draft_tokens: how many at most. repetitions: what they are
    drafted by.
    """

    tokens: list[int]
    new_tokens: int
    choose: Choose
    ends: frozenset[int] = frozenset()
    computed: int = 0
    written: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    draft_tokens: int = 1
    repetitions: Repetitions | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing follows."""
        return bool(self.written) and (self.written[-1] in self.ends or len(self.written) == self.new_tokens)

    @property
    def draftable(self) -> int:
        """So many tokens may be drafted now: none before all of its own but the last are computed, and none for the last."""
        ready = len(self.tokens) == self.computed + 1
        return min(self.draft_tokens, self.new_tokens - len(self.written) - 1) if ready else 0


Choose = Callable[[Place, "ndarray"], int]
"""The next token of a place, by its logits."""


class LlamaCppModel(LoadedModel):
    """One GGUF file. options: `dtype`, what keys and values are kept in, or `kv_cache`, q8_0; `speculation`; `task`, of what
    answers by vectors or labels. Threads are switched in place.
    """

    follows = PROCESSED
    passes = written = 0
    draft: Draft | None = None

    def load(self) -> None:
        self.api, self.speculation = library.library(), speculation_of(self.options)
        if self.speculation and self.speculation.method == "draft":
            self.draft = Draft(LlamaCppModel(self.weights / DRAFT, Serving.read(self.weights / DRAFT), self.limits))
        files = sorted(self.weights.glob("*.gguf"))
        self.model = library.load_model(files[0]) if files else 0
        if not self.model:
            raise StageError(f"llama.cpp cannot load {files[0] if files else self.weights}; export the variant again")
        self.vocabulary: int = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.answering = Answering(self, load_config(self.served), self.weights) if "task" in self.options else None
        self.adapters = {name: self._adapter(folder) for name, folder in kept_adapters(self.weights).items()}
        self.context = self.api.llama_init_from_model(self.model, self._parameters())
        if not self.context:
            raise StageError(f"llama.cpp makes no context of {self.limits.max_batch} x {self.limits.max_tokens} tokens for it")
        self.batch = self.api.llama_batch_init(self.at_once, 0, 1)

    def _adapter(self, folder: Path) -> c_void_p:
        """An adapter, which has to be there before the context is; the model frees it with itself."""
        found = self.api.llama_adapter_lora_init(self.model, str(folder / ADAPTER_FILE).encode())
        if not found:
            raise StageError(f"llama.cpp cannot load adapter {folder.name}; export the variant again")
        return c_void_p(found)

    def adapt(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise StageError(f"no adapter {name} lies beside this model")
        chosen = [] if name is None else [self.adapters[name]]
        adapters, scales = (c_void_p * len(chosen))(*chosen), (c_float * len(chosen))(*(1.0 for _ in chosen))
        if status := self.api.llama_set_adapters_lora(self.context, adapters, len(chosen), scales):
            raise StageError(f"llama.cpp could not take adapter {name} (llama_set_adapters_lora returned {status})")

    @property
    def _steps(self) -> int:
        """The most tokens of a pass in which every text that is being written goes on by one, with what is drafted behind it."""
        return self.limits.max_batch * (1 + (self.speculation.tokens if self.speculation else 0))

    @property
    def at_once(self) -> int:
        """The most tokens of a pass."""
        return max(AT_ONCE, self._steps)

    def _parameters(self) -> library.ContextParameters:
        room = -(-self.limits.max_tokens // PADDED) * PADDED
        told = self.api.llama_context_default_params()
        told.n_ctx, told.n_seq_max = room * self.limits.max_batch, self.limits.max_batch
        told.n_batch = told.n_ubatch = self.at_once
        told.n_outputs_max = told.n_outputs_max_per_seq = self.at_once if self.answering else max(ROWS, self._steps)
        told.embeddings, told.pooling_type = self.answering is not None, library.EVERY_TOKEN
        told.n_threads = told.n_threads_batch = self.threads
        if "kv_cache" in self.options:
            told.type_k = told.type_v = library.Q8_0
            told.flash_attn_type = library.FUSED  # no other reads rounded values
        elif self.options.get("dtype") == "float32":
            told.type_k = told.type_v = library.FLOAT32
            told.flash_attn_type = library.UNFUSED  # the fused kernel rounds to float16 on its way
        return told

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        self.api.llama_set_n_threads(self.context, threads, threads)
        if self.draft:
            self.draft.model.set_threads(threads)

    def unload(self) -> None:
        if self.draft:
            self.draft.model.unload()
        with suppress(AttributeError):  # of what failed to load
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
            self.api.llama_model_free(self.model)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return [self._score(window) for window in windows]

    def _score(self, window: list[int]) -> list[float]:
        """A stretch at a time, so that few rows of logits are held."""
        import numpy

        scores: list[float] = []
        self.forget(0)
        for start in range(0, len(window) - 1, ROWS):
            ids = window[start : min(start + ROWS, len(window) - 1)]
            logits = self.decode([(token, start + place, 0, True) for place, token in enumerate(ids)])
            top = logits.max(1)
            total = numpy.exp(logits - top[:, None]).sum(1, dtype=numpy.float64)
            chosen = logits[range(len(ids)), window[start + 1 : start + 1 + len(ids)]]
            scores += (chosen - top - numpy.log(total)).tolist()
        return scores

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        if self.answering is None:
            return super().outputs(ids, types)
        return answered(self.answering.config, self.limits.max_batch, ids, types, self.answering)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        began, first, waiting = perf_counter(), 0.0, len(prompts)
        if self.answering:
            self.outputs(prompts, [[0] * len(prompt) for prompt in prompts])
            return Generation([[] for _ in prompts], Timing(first, perf_counter() - began))
        places = [Place(list(prompt), new_tokens, _likeliest) for prompt in prompts]
        for place in self._written(_one_by_one(places)):
            waiting -= len(place.written) == 1
            first = first or (0.0 if waiting else perf_counter() - began)
        return Generation([place.written for place in places], Timing(first, perf_counter() - began))

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """A text that has come to its end makes room for the next at once."""
        places = [_place(prompt, new_tokens, settings) for prompt in prompts]
        for _ in self._written(_one_by_one(places)):
            pass
        return [place.written for place in places]

    def converse(self, line: Line) -> None:
        """A text joins those that are being written as soon as there is a place, at any length; only another adapter waits."""
        if self.answering:
            super().converse(line)
            return
        asked: dict[Place, Ask] = {}

        def more(idle: bool) -> Place | None:
            ask = line.next(lambda ask: idle or ask.adapter == self.adapter, until=ENDLESSLY if idle else NOW, overtaking=False)
            if ask is None:
                return None
            wanted = GenerationSettings(dict(ask.settings))
            if reason := wanted.refusal(self.follows, type(self).__name__):
                line.failed([ask], StageError(reason))
                return more(idle)
            self.take_adapter(ask.adapter)
            place = _place(ask.prompt, ask.new_tokens, wanted)
            asked[place] = ask
            return place

        for place in self._written(more, line.most):
            ask = asked[place]
            if len(place.written) == 1:
                line.begun([ask], line.now)
            if place.whole:
                line.done(ask, GenerationSettings(dict(ask.settings)).cut(place.written, ask.new_tokens))
                del asked[place]

    def _written(self, more: Callable[[bool], Place | None], most: float = math.inf) -> Iterator[Place]:
        """Each place as often as it has another token, until it is whole. more: the next one, where there is one; told whether
        there are no others. most: so many at once, where that is less than there is room for."""
        slots = range(int(min(most, self.limits.max_batch)))
        active: dict[int, Place] = {}
        while True:
            for slot in (slot for slot in slots if slot not in active):
                if (place := more(not active)) is None:
                    break
                self.forget(slot)
                active[slot] = place
            if not active:
                return
            self._draft_all(active)
            for slot, logits in self._step(active):
                yield from self._go_on(active[slot], slot, logits)
                if active[slot].whole:
                    del active[slot]

    def _go_on(self, place: Place, slot: int, logits: ndarray) -> Iterator[Place]:
        """The place, as often as it has another token: one behind its last, and one behind each draft that it accepts."""
        drafted, accepted = place.drafted, 0
        for row in logits:
            token = place.choose(place, row)
            place.tokens.append(token)
            place.written.append(token)
            yield place
            if place.whole or accepted == len(drafted) or token != drafted[accepted]:
                break
            accepted += 1
        place.computed += accepted
        self.passes, self.written = self.passes + 1, self.written + accepted + 1
        if self.speculation and drafted:
            self.forget(slot, place.computed)
            place.draft_tokens = next_draft_tokens(self.speculation, accepted)

    def _draft_all(self, active: dict[int, Place]) -> None:
        """What is drafted behind each text's last token."""
        if self.speculation is None:
            return
        for place in active.values():
            place.drafted = []
        asked = {slot: (place.tokens, most) for slot, place in active.items() if (most := place.draftable) > 0}
        if self.draft:
            for slot, drafted in self.draft.propose(asked).items():
                active[slot].drafted = drafted
            return
        for slot, (tokens, most) in asked.items():
            place = active[slot]
            place.repetitions = place.repetitions or Repetitions(self.speculation.ngram_size)
            place.drafted = place.repetitions.after(tokens, most)

    def _step(self, active: dict[int, Place]) -> Iterator[tuple[int, ndarray]]:
        """One pass over what is not computed yet, as much as fits, and what is drafted; (slot, logits) of those that are up to
        their last token: of that token, and of each that is drafted behind it."""
        entries, ready, room = list[Entry](), list[tuple[int, int]](), self.at_once
        for slot, place in active.items():
            end = min(len(place.tokens), place.computed + room)
            last = end == len(place.tokens) and end > place.computed
            place.drafted = place.drafted[: room - (end - place.computed)]
            unread = [*place.tokens[place.computed : end], *place.drafted]
            wanted = 1 + len(place.drafted) if last else 0
            first = len(unread) - wanted
            entries += [(token, place.computed + at, slot, at >= first) for at, token in enumerate(unread)]
            room, place.computed = room - len(unread), end
            ready += [(slot, wanted)] if last else []
        logits, start = self.decode(entries), 0
        for slot, count in ready:
            yield slot, logits[start : start + count]
            start += count

    def decode(self, entries: list[Entry]) -> ndarray:
        """The logits that are wanted: float32 [wanted, vocabulary], valid until the next call."""
        import numpy

        wanted = self._compute(entries)
        if not wanted:
            return numpy.empty((0, self.vocabulary), numpy.float32)
        return numpy.ctypeslib.as_array(self.api.llama_get_logits(self.context), (wanted, self.vocabulary))

    def states(self, entries: list[Entry]) -> Tensor:
        """What the layers leave behind each token, in a context that keeps it: float32 [entries, width]."""
        import numpy
        import torch

        wanted, width = self._compute(entries), self.api.llama_model_n_embd(self.model)
        found = numpy.ctypeslib.as_array(self.api.llama_get_embeddings(self.context), (wanted, width))
        return torch.from_numpy(found.copy())

    def _compute(self, entries: list[Entry]) -> int:
        """One pass; of how many tokens something is wanted."""
        batch, wanted = self.batch, sum(entry[3] for entry in entries)
        batch.n_tokens = len(entries)
        for at, (token, position, slot, asked) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = slot, asked
        if status := self.api.llama_decode(self.context, batch):
            raise StageError(f"llama.cpp could not compute {len(entries)} tokens (llama_decode returned {status})")
        return wanted

    def forget(self, slot: int, start: int = -1) -> None:
        """What was computed of a slot, from position `start` on, by default all."""
        if not self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), slot, start, -1):
            raise StageError("llama.cpp cannot take back drafted tokens that this model has read; leave speculation out")

    def acceptance(self) -> Acceptance | None:
        return Acceptance(self.passes, self.written) if self.speculation else None


def _one_by_one(places: list[Place]) -> Callable[[bool], Place | None]:
    """Hands out each in turn, then none."""
    waiting = deque(places)
    return lambda idle: waiting.popleft() if waiting else None


def _place(prompt: list[int], new_tokens: int, settings: GenerationSettings) -> Place:
    """One that is written as settings ask for it."""
    choose = _likeliest if set(settings.values) <= LENGTHS else _choosing(settings, len(prompt))
    return Place(list(prompt), new_tokens, choose, frozenset(settings.ends))


def _likeliest(place: Place, logits: ndarray) -> int:
    return int(logits.argmax())


def _choosing(settings: GenerationSettings, prompt: int) -> Choose:
    """By transformers' own processors, which are made once a text."""
    import torch

    choose = chooser(settings, prompt)
    return lambda place, logits: choose(place.tokens, torch.from_numpy(logits.copy())[None])
