"""The tokenizer of a checkpoint folder, and the proof that a copy of it cuts text into the same ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import TOKENIZER_CONFIG, Listing, has_tokenizer
from featherweight.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = (
    'Once upon a time, in 1984, a fox (3.14 kg) met 2 bears; they said: "Hello!"',
    "Ein süßer Käse, façade, naïve, Ærøskøbing, čeština, Ελληνικά, русский текст, עברית, العربية, हिन्दी, ไทย",
    "中文分词测试。日本語のテキスト、한국어 문장. 😀👩‍👩‍👧🇩🇪 ½ ² ﬁ Å",
    "  two  spaces\tand a tab\n\nnew lines\r\nUPPER lower don't can't __init__(self, x=[1, 2]) -> {'a': 0} // end\u00a0\u200b",
)
"""Letters, digits, punctuation, accents, other scripts, emoji, white space, code."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from local files only."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def framed(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind every text: seen on a short one, in which it marks what it has added."""
    found: Any = tokenizer("a", return_special_tokens_mask=True)
    ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
    lead = len(list(takewhile(bool, added)))
    tail = len(list(takewhile(bool, added[lead:][::-1])))
    return ids[:lead], ids[len(ids) - tail :]


def left_out(tokenizer: Any) -> list[int]:
    """The ids that are left out of a text that is read back: special tokens, whatever part they play."""
    return sorted({*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)})


PLAIN = [{"role": role, "content": text} for role, text in (("user", "Hello"), ("assistant", "Yes?"), ("user", "Go on"))]
"""A conversation as any is."""


def chat_fault(tokenizer: Any) -> str | None:
    """Why the chat template writes no plain conversation, in one line; None where it does, or there is none."""
    if not tokenizer.chat_template:
        return None
    try:
        for said in (PLAIN[:1], PLAIN):
            tokenizer.apply_chat_template(said, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's own, and raises what it likes
        return one_line(error)
    return None


def known_by_its_name(repository: str) -> bool:
    """Whether transformers reads the tokenizer of a repository of the hub by its tokenizer.json alone, whatever class it names.

    It does so for a few whose files are known to name a wrong one; of a copy in a folder it cannot know.
    """
    from transformers.models.auto.tokenization_auto import MODEL_IDS_TO_TOKENIZERS_BACKEND

    return any(fnmatchcase(repository.lower(), pattern) for pattern in MODEL_IDS_TO_TOKENIZERS_BACKEND)


def by_its_file_alone(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the tokenizer.json in a folder describes; the folder says so itself from now on."""
    from transformers import TokenizersBackend

    found = TokenizersBackend.from_pretrained(folder, local_files_only=True)
    path = folder / TOKENIZER_CONFIG
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | {"tokenizer_class": "TokenizersBackend"}, indent=2) + "\n")
    return found


def require_same_tokenizer(
    source: Path | PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False, called: str | None = None
) -> None:
    """Raise CheckpointError unless the tokenizer in `folder` does with a sample what that of `source` does.

    Compared: ids with and without special tokens, those of a pair and of a target text, the special tokens spelt out, how ids are
    read back, and chat templates. A `source` folder without a tokenizer has none to lose. called: what errors name for `folder`.
    """
    if isinstance(source, Path):
        if not has_tokenizer(Listing.of(source)):
            return
        source = _loaded(source, trust_remote_code, f"{source}: the tokenizer")
    copy = _loaded(folder, trust_remote_code, f"{called or folder}: the saved tokenizer")
    for (what, wanted), (_, found) in zip(_behaviour(source), _behaviour(copy, source), strict=True):
        if wanted != found:
            raise CheckpointError(
                f"{called or folder}: the saved tokenizer is not the checkpoint's: {what} gives {_short(found)} "
                f"instead of {_short(wanted)}; "
                "give the checkpoint a tokenizer.json (tokenizer.save_pretrained), or name the file that it needs"
            )


def _loaded(folder: Path, trust_remote_code: bool, called: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each tokenizer family fails in its own way
        raise CheckpointError(f"{called} does not load: {one_line(error)}") from error


def _behaviour(tokenizer: Any, spelt: Any = None) -> Iterator[tuple[str, Any]]:
    """(what was tried, what came out) of a tokenizer; `spelt`: the one whose special tokens are written out."""
    special = " ".join(map(str, (spelt or tokenizer).all_special_tokens))
    yield "its special tokens", sorted((str(token), number) for token, number in _special(tokenizer))
    yield "its chat template", tokenizer.chat_template
    for text in (*SAMPLE, special, f"a{special}b"):
        ids = _ids(tokenizer, text, add_special_tokens=False)
        yield repr(text), ids
        yield f"{text!r} with special tokens", _ids(tokenizer, text)
        yield f"{text!r} as a target", _ids(tokenizer, text_target=text)
        yield f"{text!r} read back", _tried(partial(tokenizer.decode, ids))
    yield "a pair", _ids(tokenizer, SAMPLE[0], SAMPLE[1])


def _ids(tokenizer: Any, *texts: str, **options: Any) -> Any:
    return _tried(lambda: tokenizer(*texts, **options)["input_ids"])


def _special(tokenizer: Any) -> Iterator[tuple[str, int]]:
    return zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)


def _tried(work: Callable[[], Any]) -> Any:
    """What `work` returns; where a tokenizer cannot do it, the kind of its error: its copy cannot either."""
    try:
        return work()
    except Exception as error:  # each tokenizer family fails in its own way
        return type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
