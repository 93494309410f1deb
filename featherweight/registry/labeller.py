"""Text in, vectors or labels out, through a served encoder's own engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.checkpoint.opening import load_config
from featherweight.errors import DataError, one_line
from featherweight.model.architecture import scored_by, task_of
from featherweight.model.heads import by_label
from featherweight.model.positions import context_tokens
from featherweight.registry.entities import entities
from featherweight.registry.served_engine import ServedEngine, require_kinds
from featherweight.runtimes.interface import Limits
from featherweight.store.served_folder import verified_tokens
from featherweight.text.examples import encoded, types_of

Rows = list[list[float]]
PAIR = ("text", "text_pair")
"""What the two texts of a pair are called."""


class Labeller(ServedEngine):
    """A served encoder's engine and tokenizer: a vector for each text, its labels, or the entities in it.

    Answers are those of sentence-transformers' `encode`, or of transformers' pipeline for the task. Safe to call from several
    threads, whose texts are answered together. max_tokens: the longest text; by default as many tokens as were verified.
    """

    def __init__(
        self, served: Path, threads: int = 1, max_tokens: int | None = None, max_batch: int = 8, batch_window_s: float = 0.0
    ) -> None:
        super().__init__(served, Limits(threads, max_tokens or verified_tokens(served), max_batch, batch_window_s))
        self.config = load_config(served)
        self.task = task_of(self.config)
        self._open()

    def __call__(
        self, texts: Sequence[Any], truncate: bool | None = None, aggregate: bool | None = True, prompt_name: str | None = None
    ) -> Any:
        """An answer to each text, or pair of texts.

        feature-extraction: a vector, float32 [texts, width]. text-classification: `label` and `score` of the likeliest label, and
        the `scores` of all, by their places too where labels share a name; a checkpoint of one label (a reranker) has one `score`.
        token-classification: the entities of each text, with `entity`, `score`, `word`, `start` and `end`; tokens by themselves
        where `aggregate` is false.
        prompt_name: of the prompts that a checkpoint of vectors has (query, document ...), the one before each text; by default the
        one that its files name for all. truncate: whether a text that is too long is cut; by default of embeddings, as their files
        ask for, and of what sentence-transformers made a cross-encoder, and of no others.
        Raises DataError for what is no text or does not fit, StageError where the engine fails; the next call starts it anew.
        """
        self._require_few(texts)
        require_kinds(truncate=(truncate, bool), aggregate=(aggregate, bool), prompt_name=(prompt_name, str))
        cut = self._cuts if truncate is None else truncate
        told = [self._encode(one, cut, prompt_name) for one in texts]
        answers = self._outputs(told)
        if self.task == "feature-extraction":
            return _vectors(answers)
        if self.task == "text-classification":
            return [scored(self.config, rows) for rows in answers]
        whole = aggregate is not False
        return [entities(self.config, text, one, rows, whole) for text, one, rows in zip(texts, told, answers, strict=True)]

    def _encode(self, given: Any, cut: bool, prompt: str | None) -> Any:
        text, pair = _parts(given)
        if prompt is not None and self.task != "feature-extraction":
            raise DataError(f"prompt_name is for embeddings, and this model is one for {self.task}; leave it out")
        if pair is not None and self.task != "text-classification":
            raise DataError(f"two texts are asked of a model for {self.task}, which reads one; give a text")
        self._require_text(text, pair or "", cut=cut)
        longest = self._longest if cut else None
        offsets = self.task == "token-classification"
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if offsets else {}
        told = encoded(self.config, self._tokenizer, text, pair, longest, prompt, **options)
        if len(told["input_ids"]) > self.max_tokens:
            otherwise = "" if cut else ", or truncate"
            raise DataError(
                f"a text of {len(told['input_ids'])} tokens: this model is served for {self.max_tokens}; give less{otherwise}"
            )
        return told

    @property
    def _cuts(self) -> bool:
        """Whether a text that is too long is cut by default, as sentence-transformers does it to what is its own."""
        return self.task == "feature-extraction" or (self.task == "text-classification" and bool(scored_by(self.config)))

    @property
    def _longest(self) -> int:
        """Where a text is cut: of embeddings as their files say, else where the tokenizer does it in transformers' pipelines."""
        longest = context_tokens(self.config)
        return longest if self.task == "feature-extraction" else min(longest, self._tokenizer.model_max_length)

    def _outputs(self, told: list[Any]) -> list[Rows]:
        if not told:
            return []
        with self._running() as worker:
            return worker.outputs([list(one["input_ids"]) for one in told], [types_of(one) for one in told])


def _parts(given: Any) -> tuple[str, str | None]:
    """A text, or two: a pair, or a mapping of `text` and `text_pair`."""
    if isinstance(given, Mapping):
        if PAIR[0] in given:
            _require_named(given)
        given = tuple(given.get(key) for key in PAIR)
    parts = (given, None) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else (None,)
    if len(parts) != 2 or not isinstance(parts[0], str) or not isinstance(parts[1], str | None):
        raise DataError("give a text, or two of them as a pair or under 'text' and 'text_pair'")
    return parts[0], parts[1]


def scored(config: Any, rows: Rows) -> dict[str, Any]:
    """The labels of a text by transformers' own rules: sigmoids of labels that stand by themselves, else a softmax.

    What a regression says is its score; and so is what a cross-encoder says whose config asks for no activation.
    """
    if by_label(config):
        logits = [row[1] for row in rows]
        scores = logits if _without_activation(config) else [_sigmoid(logit) for logit in logits]
    else:
        logits = rows[0]
        least = max(logits)
        total = math.fsum(math.exp(logit - least) for logit in logits)
        scores = [math.exp(logit - least) / total for logit in logits]
    if config.problem_type == "regression":
        scores = logits
    names = [config.id2label[place] for place in range(len(scores))]
    best = max(range(len(scores)), key=scores.__getitem__)
    told = names if len(set(names)) == len(names) else [f"{place} {name}" for place, name in enumerate(names)]
    return {"label": names[best], "score": scores[best], "scores": dict(zip(told, scores, strict=True))}


def _without_activation(config: Any) -> bool:
    """Whether sentence-transformers gives this cross-encoder's logit as its score."""
    return config.num_labels == 1 and scored_by(config).endswith("Identity")


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _vectors(answers: list[Rows]) -> Any:
    import numpy

    return numpy.array([rows[0] for rows in answers], dtype=numpy.float32)


ASKED = "input"
"""What OpenAI's API calls the texts that vectors are asked of: one, or several, and no pair."""


def texts_of(model_input: Any) -> list[Any]:
    """The texts in what MLflow hands to a model: texts, pairs, or rows of `text` and `text_pair`, over HTTP as arrays of numpy."""
    if isinstance(model_input, Mapping):
        told = {name: _plain(value) for name, value in model_input.items()}
        if told.keys() == {ASKED}:
            return told[ASKED] if isinstance(told[ASKED], list) else [told[ASKED]]
        columns = [told[name] for name in PAIR if name in told]
        of_several = bool(columns) and all(isinstance(column, list) for column in columns)
        if of_several:
            _require_named(told)
        return [one[0] if len(columns) == 1 else one for one in zip(*columns, strict=True)] if of_several else [told]
    if not hasattr(model_input, "columns"):
        told = _plain(model_input)
        asked = [told] if isinstance(told, str) else told
        return [{k: _plain(v) for k, v in one.items()} if isinstance(one, Mapping) else one for one in asked]
    if set(PAIR) <= set(model_input.columns):
        return list(zip(*(model_input[name].tolist() for name in PAIR), strict=True))
    if not len(model_input.columns):
        return []
    name = PAIR[0] if PAIR[0] in model_input.columns else model_input.columns[0]
    _require_alone(name, model_input)
    cells = [_plain(cell) for cell in model_input[name].tolist()]
    return cells[0] if name == ASKED and len(cells) == 1 and isinstance(cells[0], list) else cells


def _require_named(given: Mapping[str, Any]) -> None:
    """Raise DataError for what is neither text of a pair, and would be lost."""
    if other := next((key for key in given if key not in PAIR), None):
        raise DataError(f"'{one_line(other, 60)}' stands beside a text; two texts are called {' and '.join(PAIR)}")


def _require_alone(name: Any, table: Any) -> None:
    """Raise DataError where a table's column of that name is not the only one that may hold the texts: a second would be lost."""
    others = [one for one in table.columns if one != name]
    if others and (name != PAIR[0] or any(isinstance(cell, str) for one in others for cell in table[one])):
        raise DataError(
            f"a table of {one_line(', '.join(map(str, table.columns)), 100)}; call its texts {PAIR[0]}, the second ones of pairs "
            f"{PAIR[1]}, and leave out the others"
        )


def _plain(value: Any) -> Any:
    """A list, or the one value in it, of an array."""
    return value.tolist() if hasattr(value, "tolist") else value
