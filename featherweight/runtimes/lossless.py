"""Speculation is lossless, or it is not served: with it a variant writes what its files write without, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from featherweight.errors import ParityError
from featherweight.runtimes.client import Worker, open_worker
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import Tokens
from featherweight.runtimes.probes import new_tokens, probe_prompts, probe_windows
from featherweight.runtimes.speculation import OPTION, speculation_of
from featherweight.store.served_folder import FILE, Serving

if TYPE_CHECKING:
    from featherweight.runtimes.writing import Source

REPEATED = 8
"""Tokens of the passage that stands again and again in a prompt whose continuation is easily drafted."""
SHORT = 32


def speculates(served: Path) -> bool:
    """Whether a served folder drafts tokens."""
    return speculation_of(Serving.read(served).options) is not None


@contextmanager
def without_speculation(served: Path) -> Iterator[Path]:
    """The same files, served token by token: a folder for as long."""
    serving = Serving.read(served)
    with TemporaryDirectory(prefix="featherweight-") as folder:
        for path in served.resolve().iterdir():
            if path.name != FILE:
                (Path(folder) / path.name).symlink_to(path)
        options = {name: value for name, value in serving.options.items() if name != OPTION}
        replace(serving, options=options).write(Path(folder))
        yield Path(folder)


def check_lossless(served: Path, source: Source) -> None:
    """Compare what is written with speculation and without, behind prompts of the calibration text and one that repeats itself.

    Alone and several at once, to the longest that is served; greedily, and as the checkpoint's own settings ask for it where they
    draw nothing by lot. Raises ParityError at the first place that differs.
    """
    source.progress.note("comparing with the same without speculation")
    tokens = source.max_tokens
    prompts = _prompts(source, tokens)
    with open_worker(served, 1, tokens, len(prompts)) as worker:
        drafted = _texts(worker, prompts, source)
    with without_speculation(served) as folder, open_worker(folder, 1, tokens, len(prompts)) as worker:
        plain = _texts(worker, prompts, source)
    hold_same(prompts * (len(drafted) // len(prompts)), drafted, plain)


def hold_same(prompts: Tokens, drafted: Tokens, plain: Tokens) -> None:
    """Raise ParityError where texts behind prompts differ, with the first place that does."""
    for prompt, ours, theirs in zip(prompts, drafted, plain, strict=True):
        if ours != theirs:
            at = next((at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
            at = min(len(ours), len(theirs)) if at is None else at
            raise ParityError(
                f"speculation changes the text behind a prompt of {len(prompt)} tokens: new token {at + 1} is {_told(ours, at)} "
                f"with it, {_told(theirs, at)} without; leave speculation out"
            )


def _told(tokens: Sequence[int], at: int) -> str:
    return str(tokens[at]) if at < len(tokens) else "none"


def _prompts(source: Source, tokens: int) -> Tokens:
    """To the end of what is served and across the model's edges; the beginnings of pieces; one that repeats itself."""
    windows = probe_windows(source.checkpoint, source.config, source.calibration, tokens)
    short = min(SHORT, tokens - new_tokens(tokens))
    passage = windows[-1].ids[1 : 1 + REPEATED]
    repeated = [*windows[-1].ids[:1], *passage * (short // REPEATED)][:short]
    return [*probe_prompts(source.config, windows[0], tokens), *(one.ids[:short] for one in windows[-2:]), repeated]


def _texts(worker: Worker, prompts: Tokens, source: Source) -> Tokens:
    """What is written behind the prompts: all at once, each alone, and as the checkpoint's settings ask for it."""
    settings = GenerationSettings.read(source.checkpoint).values
    most = [min(64, source.max_tokens - len(prompt)) for prompt in prompts]
    at_once = worker.generate(prompts, min(most))
    alone = [worker.generate([prompt], new)[0] for prompt, new in zip(prompts, most, strict=True)]
    if settings.get("do_sample"):
        return [*at_once, *alone]
    return [*at_once, *alone, *worker.answer(prompts, min(most), settings)]
