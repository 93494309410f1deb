"""How a checkpoint wants its texts written: what its generation_config.json says, and what each engine can follow of it.

The served model answers as transformers' `generate` does with these settings: greedy where they ask for neither beams nor
sampling. Measurements do not follow them: what is timed and compared is the model, over exactly so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import GENERATION, generation_config

if TYPE_CHECKING:
    from torch import Tensor

COUNTS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens")
"""Which transformers passes by where they are 0, or below."""
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1.0),
    **dict.fromkeys(COUNTS, 0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty"), 1),
    "early_stopping": False,
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p"), 0.0),
    **{"do_sample": False, "penalty_alpha": 0.0},
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = frozenset({"num_beams", "length_penalty", "early_stopping"})
"""What a search of several texts at once takes; the latter two mean nothing without the first."""
LENGTHS = frozenset({"eos_token_id", "max_length", "max_new_tokens", "forced_eos_token_id"})
"""What any engine's answer follows: where it ends."""
PROCESSED = LENGTHS | {
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "min_length", "min_new_tokens"),
}
"""What an engine that hands out its logits follows: see `processors`."""
EVERYTHING = (
    PROCESSED
    | BEAMS
    | {
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "sequence_bias", "exponential_decay_length_penalty"),
        *(*SAMPLING, "renormalize_logits", "remove_invalid_values"),
    }
)
"""What transformers itself follows of what changes a text."""
FOLLOWED_BY_NONE = (
    *("guidance_scale", "num_beam_groups", "stop_strings", "watermarking_config", "penalty_alpha", "dola_layers"),
    *("token_healing", "constraints", "force_words_ids", "cache_implementation", "max_time"),
)
"""What changes a text, and is refused for every engine."""
WITHOUT_EFFECT = {
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "pad_token_id"), "settled when it is loaded, or of padding alone"),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp", "speculation_type"), "guessing ahead"),
    **dict.fromkeys(("assistant_early_exit", "assistant_confidence_threshold", "assistant_lookbehind"), "guessing ahead"),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"), "guessing ahead"),
    **dict.fromkeys(("assistant_ensemble_weight", "is_assistant"), "of a second model, and here is none"),
    **dict.fromkeys(("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"), "where keys are kept"),
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config"), "how it is run"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), "what else comes back"),
    **dict.fromkeys(("num_return_sequences", "return_dict_in_generate"), "here one text for each prompt comes back"),
    "transformers_version": "who wrote it",
    "diversity_penalty": "of groups of beams, which are refused",
}
"""What the same text comes of whatever it says, and why."""


@dataclass(frozen=True)
class GenerationSettings:
    """What is set and changes a text; `values` has the names of transformers' GenerationConfig."""

    values: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> GenerationSettings:
        """Of a checkpoint or a served folder, as transformers reads it: of config.json where there is no file of its own."""
        return cls.of(generation_config(folder))

    @classmethod
    def of(cls, config: Any) -> GenerationSettings:
        """Of transformers' own object; what says nothing new is left out."""
        given = {name: getattr(config, name, None) for name in sorted(EVERYTHING.union(FOLLOWED_BY_NONE))}
        silent = set() if given["do_sample"] else set(SAMPLING)
        silent |= set() if (given["num_beams"] or 1) > 1 else set(BEAMS)
        silent |= set() if given["cache_implementation"] == "quantized" else {"cache_implementation"}
        silent |= {name for name in COUNTS if (given[name] or 0) < 0}
        return cls(
            {
                name: value
                for name, value in given.items()
                if value not in (None, [], {}) and value != NEUTRAL.get(name) and name not in silent
            }
        )

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text; a -1 stands for none."""
        ends = self.values.get("eos_token_id", [])
        return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end >= 0]

    def new_tokens(self, prompt: int, default: int) -> int:
        """How many tokens to write at most behind a prompt of that many; none, or fewer, where they have no room for one."""
        most = self.values.get("max_new_tokens")
        if most is None and "max_length" in self.values:
            most = int(self.values["max_length"]) - prompt
        return default if most is None else int(most)

    def refusal(self, followed: Collection[str], engine: str) -> str | None:
        """Why the engine does not write as these settings ask; None where it does."""
        missing = sorted(set(self.values) - set(followed))
        if {"num_beams", "do_sample"} <= set(self.values) and EVERYTHING.difference(followed):
            missing.append("do_sample with num_beams")
        if not missing:
            return None
        them = "them" if len(missing) > 1 else "it"
        elsewhere = "" if set(missing).intersection(FOLLOWED_BY_NONE) else "take another engine, or "
        return (
            f"{engine} cannot write as the checkpoint's {GENERATION} asks: it does not follow {', '.join(missing)}; "
            f"{elsewhere}take {them} out of that file"
        )

    def cut(self, tokens: list[int], new_tokens: int) -> list[int]:
        """The written tokens up to the first end, which is kept: a tokenizer that does not call it special leaves it in the text.

        Of `new_tokens` that there is room for a forced end takes the last place, whether it is an end itself or not. An engine may
        leave an end out where there is but one: a text that is shorter came to it.
        """
        ends, forced = self.ends, self.values.get("forced_eos_token_id")
        place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        if forced is None or place < new_tokens - 1:
            left_out = ends if place == len(tokens) < new_tokens and len(ends) == 1 else []
            return [*tokens[: place + 1], *left_out]
        return [*tokens[: new_tokens - 1], min(forced) if isinstance(forced, list) else forced]


def chosen_text(
    logits: Callable[[list[int]], Tensor], prompt: list[int], new_tokens: int, settings: GenerationSettings
) -> list[int]:
    """What is written behind `prompt`, each token chosen as `chooser` does, up to an end (included) or `new_tokens` tokens.

    `logits` is given the tokens that it has not read yet and returns those of the next one, float32 (1, vocabulary).
    """
    choose, written, unread = chooser(settings, len(prompt)), list(prompt), list(prompt)
    while True:
        unread = [choose(written, logits(unread))]
        written += unread
        if unread[0] in settings.ends or len(written) == len(prompt) + new_tokens:
            return written[len(prompt) :]


def chooser(settings: GenerationSettings, prompt: int) -> Callable[[list[int], Tensor], int]:
    """Chooses the token behind a text, `prompt` tokens of which were given, by its logits, (1, vocabulary), as `generate` does."""
    import torch

    processed, sampled = processors(settings, prompt), settings.values.get("do_sample")

    def choose(text: list[int], logits: Tensor) -> int:
        scores = processed(torch.tensor([text]), logits)
        return int(torch.multinomial(scores.softmax(-1), 1) if sampled else scores.argmax())

    return choose


def processors(settings: GenerationSettings, prompt: int) -> Any:
    """transformers' own logits processors, in its order, for prompts of `prompt` tokens; each takes (ids, scores)."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as kinds

    values, ends, found = settings.values, settings.ends, LogitsProcessorList()
    if "repetition_penalty" in values:
        found.append(kinds.RepetitionPenaltyLogitsProcessor(values["repetition_penalty"]))
    if "no_repeat_ngram_size" in values:
        found.append(kinds.NoRepeatNGramLogitsProcessor(values["no_repeat_ngram_size"]))
    if "bad_words_ids" in values:
        found.append(kinds.NoBadWordsLogitsProcessor(values["bad_words_ids"], ends or None))
    if ends and "min_length" in values:
        found.append(kinds.MinLengthLogitsProcessor(values["min_length"], ends))
    if ends and "min_new_tokens" in values:
        found.append(kinds.MinNewTokensLengthLogitsProcessor(prompt, values["min_new_tokens"], ends))
    if "forced_bos_token_id" in values:
        found.append(kinds.ForcedBOSTokenLogitsProcessor(values["forced_bos_token_id"]))
    if "suppress_tokens" in values:
        found.append(kinds.SuppressTokensLogitsProcessor(values["suppress_tokens"]))
    if "begin_suppress_tokens" in values:
        begin = prompt + (prompt == 1 and "forced_bos_token_id" in values)
        found.append(kinds.SuppressTokensAtBeginLogitsProcessor(values["begin_suppress_tokens"], begin))
    return _sampling(settings, found)


def _sampling(settings: GenerationSettings, found: Any) -> Any:
    """The warpers behind the processors, with transformers' defaults, where the settings ask for sampling."""
    from transformers.generation import logits_process as kinds

    if settings.values.get("do_sample"):
        temperature, top_k, top_p = (settings.values.get(name) for name in ("temperature", "top_k", "top_p"))
        if temperature not in (None, 1.0):
            found.append(kinds.TemperatureLogitsWarper(temperature))
        if top_k is None or top_k:
            found.append(kinds.TopKLogitsWarper(50 if top_k is None else top_k))
        if top_p is not None and top_p < 1:
            found.append(kinds.TopPLogitsWarper(top_p))
    return found
