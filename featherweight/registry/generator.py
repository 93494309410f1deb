"""Text in, text out, through a served variant's own engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from featherweight.checkpoint.kept_adapters import kept_adapters
from featherweight.checkpoint.opening import generation_config, starting_token
from featherweight.errors import DataError, one_line
from featherweight.model.architecture import Family, family_of
from featherweight.registry.conversation import ROLE, Message, require_messages, said, spelt
from featherweight.registry.served_engine import ServedEngine, require_kinds
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import Limits
from featherweight.store.served_folder import verified_tokens

DEFAULT_NEW_TOKENS = 64
SEVERAL = ("prompt", "input")
"""Under which OpenAI's API has one text, or several."""


class Generator(ServedEngine):
    """A served folder's engine and tokenizer, which answer as transformers' `generate` does with the folder's own
    generation_config.json (greedy, where that does not ask for sampling). Safe to call from several threads, whose texts are
    written together as far as the engine can.

    max_tokens: room for a prompt and its new tokens; by default as many as were verified. Raises StageError for more.
    """

    def __init__(
        self, served: Path, threads: int = 1, max_tokens: int | None = None, max_batch: int = 8, batch_window_s: float = 0.0
    ) -> None:
        super().__init__(served, Limits(threads, max_tokens or verified_tokens(served), max_batch, batch_window_s))
        self._family = _family(served)
        self._settings = GenerationSettings.read(served)
        self._adapters = tuple(kept_adapters(served))
        self._start = [starting_token(generation_config(served))] if self._family == "seq2seq" else []
        self._open()

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        max_new_tokens: int | None = None,
        stop_at_end: bool | None = True,
        adapter: str | None = None,
    ) -> list[str]:
        """What follows each prompt: at most `max_new_tokens` tokens, up to a token that ends a text if `stop_at_end`.

        A prompt may be a conversation, messages of `role` and `content`: the answer is what the assistant says next. A content may
        be parts that are texts, or none beside `tool_calls`, as OpenAI has them. One that ends with what the assistant said is
        answered by another turn of its, and not gone on with.
        max_new_tokens: by default what generation_config.json says, else 64. Where nothing is to stop the text, none of those
        settings is followed. adapter: the name of the one that answers, of those that are served beside the model; None for the
        model alone. Of a seq2seq model, what it makes of each prompt. Of an encoder, each prompt with its masks filled in.
        Raises DataError for a prompt that is empty or does not fit, StageError where the engine fails; the next call then
        starts the engine anew.
        """
        self._require_few(prompts)
        require_kinds(max_new_tokens=(max_new_tokens, Integral), stop_at_end=(stop_at_end, bool), adapter=(adapter, str))
        self._require_adapter(adapter)
        encoded = [self._encode(prompt) for prompt in prompts]
        wanted = [self._room(ids, max_new_tokens) for ids in encoded]
        new: list[list[int]] = [[] for _ in encoded]
        for batch, count in self._batches(wanted):
            answers = self._generate([encoded[index] for index in batch], count, stop_at_end is not False, adapter)
            for index, answer in zip(batch, answers, strict=True):
                new[index] = answer
        if self._family == "encoder":
            return [self._filled(str(prompt), ids, row) for prompt, ids, row in zip(prompts, encoded, new, strict=True)]
        return [self._decode(ids, tokens) for ids, tokens in zip(encoded, new, strict=True)]

    def _batches(self, wanted: list[int]) -> Iterator[tuple[list[int], int]]:
        """Places of prompts that want as many new tokens, at most `max_batch` at once, and how many that is."""
        for count in dict.fromkeys(wanted):
            places = [place for place, number in enumerate(wanted) if number == count]
            for start in range(0, len(places), self.max_batch):
                yield places[start : start + self.max_batch], count

    def _generate(self, prompts: list[list[int]], new_tokens: int, stop_at_end: bool, adapter: str | None) -> list[list[int]]:
        with self._running() as worker:
            settings = self._settings.values if stop_at_end and self._family != "encoder" else {}
            return worker.answer(prompts, new_tokens, settings, adapter)

    def _require_adapter(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            named, known = one_line(name, 100), ", ".join(self._adapters) or "none"
            raise DataError(f"no adapter '{named}' is served beside this model; it has {known}")

    def _room(self, ids: list[int], asked: int | None) -> int:
        """How many tokens to write behind a prompt; DataError where there is no room for one, or for as many as are asked for."""
        if self._family == "encoder":
            new = 0
        elif asked is not None:
            new = asked
        else:
            prompt = 1 if self._family == "seq2seq" else len(ids)
            new = min(self._settings.new_tokens(prompt, DEFAULT_NEW_TOKENS), max(1, self.max_tokens - len(ids)))
            if new < 1:
                raise DataError(
                    f"a prompt of {prompt} tokens: the checkpoint's settings have room for {self._settings.values['max_length']} "
                    "with what is written behind it (max_length); ask with max_new_tokens"
                )
        if (new < 1 and self._family != "encoder") or len(ids) + new > self.max_tokens:
            room = f"this model is served with room for {self.max_tokens} tokens"
            raise DataError(f"a prompt of {len(ids)} tokens and max_new_tokens {new}: {room}, one new at least")
        return new

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        if not isinstance(prompt, str):
            require_messages(prompt)
        self._require_text(*([prompt] if isinstance(prompt, str) else said(prompt)))
        ids = self._cut(prompt) if isinstance(prompt, str) else self._conversation(prompt)
        if not ids:
            raise DataError("the prompt is empty, and this tokenizer has no token to begin a text with")
        return ids

    def _cut(self, prompt: str) -> list[int]:
        try:
            return list(self._tokenizer(prompt)["input_ids"])
        except Exception as error:  # of a tokenizer without a token for what it does not know, say
            raise DataError(f"the tokenizer does not cut this prompt: {one_line(error)}") from error

    def _conversation(self, messages: Sequence[Message]) -> list[int]:
        """As the checkpoint's chat template writes it, up to where the assistant begins; the template puts BOS where it belongs."""
        if not self._tokenizer.chat_template:
            raise DataError("this model has no chat template, so that it takes texts and no conversations; give a prompt")
        try:
            told = [spelt(one, self._tokenizer) for one in messages]
            found: Any = self._tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of the checkpoint's own, and raises what it likes
            raise DataError(f"the chat template refuses the conversation: {one_line(error)}") from error
        return list(found["input_ids"])

    def _filled(self, prompt: str, ids: list[int], new: list[int]) -> str:
        """The prompt with the model's token at the place of each mask."""
        tokens = [filling for was, filling in zip(ids, new, strict=True) if was == self._tokenizer.mask_token_id]
        for token in tokens:
            text = str(self._tokenizer.decode([token])).strip().removeprefix("##")
            prompt = prompt.replace(self._tokenizer.mask_token, text, 1)
        return prompt

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        """The text of the new tokens in their place, so that a leading space is kept.

        Targets of a seq2seq model are read with the token that they begin with, which a tokenizer may not call special.
        """
        if self._family == "seq2seq":
            return self._text(self._start + new)
        before, after = self._text(prompt), self._text(prompt + new)
        return after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def prompts_of(model_input: Any) -> list[Any]:
    """The prompts in what MLflow hands to a model: texts, or conversations under `messages`, a list of messages each."""
    if isinstance(model_input, Mapping):  # one request, as OpenAI's API takes it
        given = next((model_input[name] for name in ("messages", *SEVERAL) if name in model_input), None)
        return list(given) if isinstance(given, (list, tuple)) and "messages" not in model_input else [given]
    if not hasattr(model_input, "columns"):
        return [model_input] if isinstance(model_input, str) else list(model_input)
    if not len(model_input.columns):
        return []
    name = "messages" if "messages" in model_input.columns else model_input.columns[0]
    if name == ROLE:  # of which MLflow keeps the first column: a text would be written behind the word 'user'
        raise DataError("messages are given as rows, which are texts each; a conversation stands under 'messages', as one list")
    cells = [cell.tolist() if hasattr(cell, "tolist") else cell for cell in model_input[name].tolist()]
    if name == "messages":
        if any(isinstance(cell, str) for cell in cells):
            raise DataError("messages are conversations, lists of messages; a text stands under 'prompt'")
        return [cells] if all(isinstance(cell, Mapping) for cell in cells) else cells
    several = len(cells) == 1 and isinstance(cells[0], list) and all(isinstance(one, str) for one in cells[0])
    return cells[0] if several and name in SEVERAL else cells  # several prompts of one request, as OpenAI's API takes them


def _family(served: Path) -> Family:
    """What kind of model a served folder holds, from the configuration that lies beside its tokenizer."""
    from transformers import AutoConfig

    return family_of(AutoConfig.from_pretrained(served, local_files_only=True))
