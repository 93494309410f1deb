"""Vocabulary trimming: tokens that are never used leave the embedding, the head and the tokenizer.

Abdaoui et al.: "Load What You Need: Smaller Versions of Multilingual BERT", 2020. What stays computes what it computed: the logits
of the tokens that stay are the same bits. A text of these tokens is cut as before, any other into smaller pieces or bytes (see
featherweight/checkpoint/pieces.py), so that nothing has to be trained again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from featherweight.checkpoint import opening
from featherweight.checkpoint.token_ids import with_places
from featherweight.checkpoint.trimmed_tokenizer import Trimmer
from featherweight.errors import StageError, nearest
from featherweight.model import surgery
from featherweight.model.architecture import task_of
from featherweight.model.facts import CheckpointFacts
from featherweight.model.parent import Parent
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.pruning.used_tokens import expected_by, likeliest, listed, used_in, written_in
from featherweight.spec import HEADED, Positive, Spec
from featherweight.text.documents import read_documents
from featherweight.text.model_inputs import example_blocks
from featherweight.training.losses import mean_loss
from featherweight.training.spec import FinetuneSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

READ = 1 << 17
"""Tokens of each text that the checkpoint is asked about."""
PROVEN = 200
"""Documents on which the trimmed tokenizer is held to the checkpoint's."""

SCRIPTS = (
    *("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "syriac", "ethiopic", "devanagari", "bengali"),
    *("gurmukhi", "gujarati", "oriya", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "tibetan", "myanmar"),
    *("khmer", "mongolian", "hangul", "hiragana", "katakana", "bopomofo", "cjk"),
)
"""As the Unicode names of their letters begin."""


def _known_script(name: str) -> str:
    if name not in SCRIPTS:
        raise ValueError(f"unknown script '{name}'; {nearest(name, SCRIPTS)}")
    return name


def _lines(told: Any) -> Any:
    """A list of tokens as it is, or what stands in the lines of a file, so that the recipe knows it and not where it lies."""
    if not isinstance(told, str):
        return told
    try:
        return [line for line in Path(told).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the tokens in {told}: {getattr(error, 'strerror', None) or error}") from error


class KeepSpec(Spec):
    """Which tokens stay, beside special and added ones.

    text: those of the recipe's text (training and calibration). tokens: a list, or a file with one a line, as the tokenizer spells
    them. scripts: those whose letters are all of these scripts. first: so many of the lowest ids, which are the commonest pieces of
    most tokenizers, for text that nobody has seen. expected: so many of those that the checkpoint itself expects in the recipe's
    text, by their probabilities summed over it: what might have stood there, and so what other text of its kind needs.
    characters: 'all' keeps every character that is a token; 'used' leaves the unused ones to the tokenizer's bytes.
    """

    text: bool = True
    tokens: Annotated[tuple[str, ...], BeforeValidator(_lines)] = ()
    scripts: tuple[Annotated[str, AfterValidator(_known_script)], ...] = ()
    first: Positive | None = None
    expected: Positive | None = None
    characters: Literal["all", "used"] = "all"

    @model_validator(mode="after")
    def _something_stays(self) -> Self:
        if not (self.text or self.tokens or self.scripts or self.first or self.expected):
            raise ValueError("keep names no tokens; say text: true, tokens, scripts, first or expected")
        return self


class VocabularySpec(PruneSpec):
    """Only the tokens that `keep` names; `keep: text` is those of the recipe's text. Without recovery training: nothing is lost."""

    method: Literal["vocabulary"] = "vocabulary"
    keep: Annotated[KeepSpec, BeforeValidator(lambda told: {} if told == "text" else told)] = Field(default_factory=KeepSpec)
    finetune: FinetuneSpec | None = None


def prune(given: PruningInput[VocabularySpec]) -> Pruned:
    """Drop tokens. Metrics of its own: `tokens_before`, `tokens`, `tokens_of_text`.

    Raises StageError for a tokenizer that cannot be trimmed, or where no token would go.
    """
    trimmer, rows = Trimmer.of(given.checkpoint), given.config.vocab_size
    used = used_in(_texts(given), trimmer.tokenizer, given.config) if given.spec.keep.text else set()
    named = _named(given.spec.keep, trimmer) | _expected(given, rows)
    kept = trimmer.kept(used | named, rows, characters=given.spec.keep.characters == "all")
    if len(kept) == rows:
        raise StageError(f"prune.method vocabulary drops none of the {rows} tokens; leave the stage out, or keep less")
    given.progress.note(f"keeping {len(kept)} of {rows} tokens, {len(used)} of them for the text")
    before, blocks = opening.parameters(given.model), covered(given.blocks, kept, given.config)
    loss = mean_loss(given.model, blocks)
    model = surgery.keep_tokens(given.model, smaller(given.config, kept), kept)
    figures = {"tokens_before": rows, "tokens": len(kept), "tokens_of_text": len(used)}
    write = partial(_write, trimmer, kept, rows, list(islice(_read(given), PROVEN)))
    return Pruned(model, before, loss, figures, write, moved(blocks, kept, given.config))


def _texts(given: PruningInput[VocabularySpec]) -> list[Path]:
    return [given.calibration, *([given.text] if given.text else [])]


def _read(given: PruningInput[VocabularySpec]) -> Iterator[str]:
    return (document.text for folder in _texts(given) for document in read_documents(folder))


def _named(keep: KeepSpec, trimmer: Trimmer) -> set[int]:
    """What is kept whatever the text."""
    written = written_in(keep.scripts, trimmer.pieces) if keep.scripts else set()
    return listed(keep.tokens, trimmer.pieces) | written | set(range(keep.first or 0))


def _expected(given: PruningInput[VocabularySpec], rows: int) -> set[int]:
    """Tokens that the checkpoint itself expects, where they are asked for."""
    import torch

    count, length = given.spec.keep.expected, given.spec.sequence
    if count is None:
        return set()
    most = -(-READ // length)
    texts = [example_blocks(given.checkpoint, given.config, folder, length, most, given.seed) for folder in _texts(given)]
    return likeliest(expected_by(given.model, torch.cat(texts)), count) & set(range(rows))


def _write(trimmer: Trimmer, kept: list[int], rows: int, texts: list[str], out: Path) -> None:
    trimmer.write(kept, rows, out)
    trimmer.require_kept(kept, out, texts)


def smaller(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    """The config of the model with these tokens alone, whose ids it names at their new places."""
    told = with_places(config.to_dict(), {old: new for new, old in enumerate(kept)})
    sizes = [key for key in ("vocab_size", "decoder_vocab_size") if getattr(config, key, None)]
    told |= dict.fromkeys((config.attribute_map.get(key, key) for key in sizes), len(kept))
    return surgery.of_the_same(config, type(config).from_dict(told))


def _ids(blocks: Tensor, config: PreTrainedConfig) -> Tensor:
    """The token ids in blocks, a view: all of them, but for those of encoders that answer a text at once (text/examples.py)."""
    if task_of(config) not in HEADED:
        return blocks[:, None]
    texts = 2 if task_of(config) == "feature-extraction" else 1
    return blocks.view(len(blocks), texts, 3, -1)[:, :, 0]


def covered(blocks: Tensor, kept: list[int], config: PreTrainedConfig) -> Tensor:
    """The blocks that are made of kept tokens alone. Raises StageError where there are none to judge by."""
    import torch

    whole = torch.isin(_ids(blocks, config), torch.tensor(kept, device=blocks.device)).flatten(1).all(1)
    if not whole.any():
        raise StageError(
            "every block of the calibration text has a token that would go, so that nothing could be judged; keep more"
        )
    return blocks[whole]


def moved(blocks: Tensor, kept: list[int], config: PreTrainedConfig) -> Tensor:
    """The same blocks with each token's new id."""
    import torch

    blocks = blocks.clone()
    _ids(blocks, config).copy_(torch.searchsorted(torch.tensor(kept, device=blocks.device), _ids(blocks, config).contiguous()))
    return blocks


def check(spec: VocabularySpec, facts: CheckpointFacts) -> None:
    """Raise StageError for a model that reads more than text, or looks its tokens up in other tables too."""
    config = facts.config
    separate = getattr(config, "share_encoder_decoder_embeddings", True) is False
    if config.get_text_config() is not config:
        raise StageError(f"prune.method vocabulary: where a {config.model_type} keeps its tokens is not known here")
    if separate or getattr(config, "vocab_size_per_layer_input", None):
        raise StageError(f"prune.method vocabulary: this {config.model_type} has more than one vocabulary; leave the stage out")


def refusal(spec: VocabularySpec, parent: Parent) -> str | None:
    """A tokenizer that is read from files of its own."""
    if spec.keep.expected is not None and parent.task in HEADED:
        return f"{parent.task} + vocabulary: keep.expected asks a model for tokens, and this one answers none; leave it out"
    name = parent.facts.tokenizer if parent.facts else None
    return f"{name} + vocabulary: {OWN_FILES[name]}" if name in OWN_FILES else None


OWN_FILES = {
    "MarianTokenizer": "its SentencePiece models and its vocab.json are two lists, which are not trimmed here; leave the stage out",
    "M2M100Tokenizer": "it counts its languages behind a vocab.json of its own, which is not trimmed here; leave the stage out",
    **dict.fromkeys(("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"), "its tokens are bytes or characters: all stay"),
}
"""Tokenizers of transformers that read no tokenizer.json, and why they keep all of their tokens."""


def operations(spec: VocabularySpec, parameters: int) -> float:
    """The blocks are read once, before, and so is the text where the checkpoint is asked what it expects; nothing is trained."""
    asked = 2 * READ if spec.keep.expected is not None else 0
    return 2.0 * parameters * (spec.samples * spec.sequence + asked)


VOCABULARY = Pruner(
    VocabularySpec,
    prune,
    ("tokenizers",),
    refusal=refusal,
    operations=operations,
    check=check,
    reads_text=True,
    other_tokens=True,
)
