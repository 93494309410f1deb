"""Parity: does the served engine compute what the PyTorch model computes? An export that does not fails its variant.

Compared are, in float32 on the CPU:
- log-probabilities of windows of tokens: one as long as the longest sequence that is served (`max_tokens` of the spec, within the
  model's context), some round each length inside at which the model begins to compute something else (a sliding window, chunks
  of attention, scaled rotary embeddings), and short ones of the calibration text;
- greedy text after prompts that end with that longest sequence, or cross one of those edges. Where the engine's token is another
  than PyTorch's, PyTorch must find it nearly as likely.
Each stretch of positions, between edges and quarters of the length, keeps the bound by itself: an error that sets in late is not
averaged away. What was verified is recorded in serving.json, and no engine is opened for more.

PyTorch's engines that round activations, by one range per layer or per token, are compared with a model that rounds them likewise:
what the rounding itself costs is a matter of quality and not of parity. How far apart the two may be:
featherweight/runtimes/bounds.py.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from featherweight.errors import ParityError, StageError
from featherweight.model.architecture import attention_options, auto_class, family_of
from featherweight.model.positions import context_tokens, crosses_switch
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import Bound
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import Worker, open_worker
from featherweight.runtimes.probes import edges_within, new_tokens, probe_prompts, probe_windows
from featherweight.store.served_folder import SERVED_TOKENS, Serving
from featherweight.text.model_inputs import IGNORED, decoder_start, window_inputs
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FEWEST = 16
"""Tokens of a stretch that say something of its average."""


@dataclass(frozen=True)
class Continuation:
    """What PyTorch writes after a prompt: its likeliest tokens, and of each step every token's log-probability.

    source: the prompt is that of a seq2seq model, whose tokens do not follow it. logprobs: float32 [steps, vocabulary].
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor
    source: bool


@dataclass(frozen=True)
class Reference:
    """Windows of tokens and what the PyTorch model says about them: log-probabilities of what is scored in each.

    positions: of what is scored. cuts: where stretches of positions begin. continuations: what it writes itself.
    """

    windows: list[Window]
    logprobs: list[list[float]]
    positions: list[list[int]]
    cuts: list[int]
    continuations: list[Continuation] = field(default_factory=list)

    fewest: ClassVar[int] = FEWEST

    @classmethod
    def of(cls, model: PreTrainedModel, source: Path, text: Path, max_tokens: int = SERVED_TOKENS) -> Reference:
        """Score windows of `text` with `model`, and write on from it, up to `max_tokens`; `source` has the tokenizer."""
        tokens = min(max_tokens, context_tokens(model.config))
        windows = probe_windows(source, model.config, text, tokens)
        prompts = probe_prompts(model.config, windows[0], tokens)
        scored = [_score(model, window) for window in windows]
        quarters = [tokens * quarter // 4 for quarter in range(4)]
        return cls(
            windows,
            [logprobs for logprobs, _ in scored],
            [positions for _, positions in scored],
            sorted({*quarters, *edges_within(model.config, tokens)}),
            [continuation(model, prompt, new_tokens(tokens)) for prompt in prompts],
        )

    def check(self, served: Path, bound: Bound | None = None, adapter: str | None = None) -> Metrics:
        """Compare with the engine that `served` names, started for it.

        bound: by default what the engine's handling of activations allows. adapter: with which of those beside it. Returns
        `parity_max_abs`, `parity_mean_abs` and `parity_bound`, in nats. Raises ParityError above the bound, for anything that is
        not a number, and where the engine cannot do it.
        """
        serving = Serving.read(served)
        bound, name = bound or bound_of(serving), f"{serving.engine} ({serving.grid or 'float'})"
        with open_worker(served, threads=1, max_tokens=self.longest, max_batch=1) as worker:
            if adapter is not None:
                name = f"{name} with adapter {adapter}"
                worker.adapt(adapter)
            with told(name, self.longest):
                found = worker.score(self.windows)
            metrics = self.hold(found, bound, name)
            for continuation in self.continuations:
                with told(name, len(continuation.prompt) + len(continuation.tokens)):
                    gaps = _gaps(worker, continuation)
                _hold_gaps(gaps, continuation, bound, name)
        return metrics

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        written = [len(one.prompt) + len(one.tokens) for one in self.continuations]
        return max([*written, *(max(len(window.ids), len(window.source)) for window in self.windows)])

    def hold_twin(self, model: PreTrainedModel, bound: Bound, name: str) -> Metrics:
        """The same for another PyTorch model, of which nothing is written."""
        return self.hold([_score(model, window)[0] for window in self.windows], bound, name)

    def hold(self, found: list[list[float]], bound: Bound, name: str) -> Metrics:
        """The same for log-probabilities that `name` has computed already; of what it writes nothing is known."""
        pairs = zip(self.logprobs, found, strict=True)
        by_window = [[abs(a - b) for a, b in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
        return self.hold_differences(by_window, bound, name)

    def hold_differences(self, by_window: list[list[float]], bound: Bound, name: str) -> Metrics:
        """Hold differences, by window, to `bound`; see `check`."""
        differences = [difference for row in by_window for difference in row]
        values = _statistics(differences)
        broken = self._broken(by_window, bound)
        if broken is not None or not _kept(differences, bound):
            start, worst = broken or (0, values)
            late = f" from token {start} on" if start else ""
            right = start or self._right_up_to(by_window, bound)
            advice = f"; it is right up to {right} tokens (workload.max_tokens)" if 0 < right < self.longest else ""
            raise ParityError(
                f"{name} does not compute what its PyTorch source computes{late}: "
                f"{bound.statistic} |difference| of log-probabilities {worst[bound.statistic]:.4g} nats over "
                f"{len(differences)} tokens, bound {bound.value:g} (max {values['max']:.4g}, mean {values['mean']:.4g}), "
                f"in sequences of up to {self.longest}{advice}"
            )
        return {"parity_max_abs": values["max"], "parity_mean_abs": values["mean"], "parity_bound": bound.value}

    def _broken(self, differences: list[list[float]], bound: Bound) -> tuple[int, dict[str, float]] | None:
        """Where the first stretch of positions begins that does not keep the bound, and its figures; None where all do."""
        stretches: list[list[float]] = [[] for _ in self.cuts]
        for positions, row in zip(self.positions, differences, strict=True):
            for position, difference in zip(positions, row, strict=True):
                stretches[bisect_right(self.cuts, position) - 1].append(difference)
        for start, stretch in zip(self.cuts, stretches, strict=True):
            if len(stretch) >= self.fewest and not _kept(stretch, bound):
                return start, _statistics(stretch)
        return None

    def _right_up_to(self, differences: list[list[float]], bound: Bound) -> int:
        """The length up to which whole windows keep the bound; 0 where none does."""
        lengths = [max(len(window.ids), len(window.source)) for window in self.windows]
        right = 0
        for length in sorted(set(lengths)):
            rows = (row for row, own in zip(differences, lengths, strict=True) if own <= length)
            if not _kept([difference for row in rows for difference in row], bound):
                break
            right = length
        return right


def load_reference(source: Path) -> PreTrainedModel:
    """The checkpoint's model, float32, on the CPU."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True)
    options = {"dtype": torch.float32, "use_safetensors": True, **attention_options(config)}
    return auto_class(config).from_pretrained(source, local_files_only=True, **options).eval()


def bound_of(serving: Serving) -> Bound:
    """The bound that an engine is held to, by how it handles activations."""
    return RUNTIMES[serving.engine].bound(serving)


def _statistics(differences: list[float]) -> dict[str, float]:
    return {"max": max(differences), "mean": sum(differences) / len(differences)}


def _kept(differences: list[float], bound: Bound) -> bool:
    """Whether the bound holds. A NaN is above any bound, but no comparison says so."""
    return all(difference >= 0 for difference in differences) and _statistics(differences)[bound.statistic] <= bound.value


@contextmanager
def told(name: str, tokens: int) -> Iterator[None]:
    """An engine that breaks off cannot be compared: say at which length."""
    try:
        yield
    except StageError as error:
        raise ParityError(f"{name} could not be compared with PyTorch on sequences of up to {tokens} tokens: {error}") from error


def _score(model: PreTrainedModel, window: Window) -> tuple[list[float], list[int]]:
    """Log-probabilities of what is scored in a window, and its positions."""
    import torch

    with torch.inference_mode():
        inputs, labels = window_inputs(model.config, torch.tensor([window.ids]), torch.tensor([window.source]))
        wanted = labels[0] != IGNORED
        logits = model(**inputs).logits[0, wanted].log_softmax(-1)
        chosen = logits.gather(-1, labels[0, wanted, None]).squeeze(-1)
        return chosen.tolist(), wanted.nonzero()[:, 0].tolist()


def continuation(model: PreTrainedModel, prompt: list[int], new: int) -> Continuation:
    """Greedy, by transformers' own `generate`."""
    import torch

    ids, source = torch.tensor([prompt]), family_of(model.config) == "seq2seq"
    with _nothing_but_greedy(model) as generator:
        made = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            use_cache=not crosses_switch(model.config, len(prompt), new),
            output_logits=True,
            return_dict_in_generate=True,
        )
    logprobs = torch.cat(made.logits).float().log_softmax(-1)
    return Continuation(prompt, made.sequences[0, -len(logprobs) :].tolist(), logprobs, source)


@contextmanager
def _nothing_but_greedy(model: Any) -> Iterator[Any]:
    """Without what a checkpoint's generation_config.json asks for: no end stops a text, and no penalty changes a choice.

    What a seq2seq decoder begins with stays (see LoadedModel.generate).
    """
    from transformers import GenerationConfig

    before, beginning = model.generation_config, {}
    if family_of(model.config) == "seq2seq":
        beginning = {"decoder_start_token_id": decoder_start(model.config), "forced_bos_token_id": before.forced_bos_token_id}
    model.generation_config = GenerationConfig(pad_token_id=before.pad_token_id, **beginning)
    try:
        yield model
    finally:
        model.generation_config = before


def _gaps(worker: Worker, ours: Continuation) -> list[float]:
    """How much less likely PyTorch finds each token that the engine writes than its own, in nats; 0 where the two agree.

    After another choice the engine goes on from PyTorch's, so that a near-tie does not end the comparison; a decoder behind a
    source cannot be told to.
    """
    gaps: list[float] = []
    while len(gaps) < len(ours.tokens):
        (written,) = worker.generate([ours.prompt + ours.tokens[: len(gaps)]], len(ours.tokens) - len(gaps))
        for token in written:
            step = len(gaps)
            gaps.append(float(ours.logprobs[step, ours.tokens[step]] - ours.logprobs[step, token]))
            if token != ours.tokens[step]:
                break
        if ours.source:
            break
    return gaps


def _hold_gaps(gaps: list[float], ours: Continuation, bound: Bound, name: str) -> None:
    """Raise ParityError where tokens are chosen that PyTorch finds less likely than two errors of `bound` explain."""
    worst = _statistics([max(gap, 0.0) if not math.isnan(gap) else gap for gap in gaps])[bound.statistic]
    if not worst <= 2 * bound.value:
        raise ParityError(
            f"{name} does not write what its PyTorch source writes after {len(ours.prompt)} tokens: PyTorch finds its tokens less "
            f"likely than its own by {bound.statistic} {worst:.4g} nats, bound {2 * bound.value:g}"
        )
