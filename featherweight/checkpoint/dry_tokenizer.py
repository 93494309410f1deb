"""What a checkpoint's tokenizer does, before any weight is read: that it loads, which ids it gives, whether it chats.

Added tokens come from four files and from a class of transformers', so that nothing but loading tells. That takes an import of
transformers, for which another Python is asked, once for the same files; where torch is here already, this one is.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featherweight.checkpoint import asking, gguf_tokenizer, gguf_words, inspection, tokenizer
from featherweight.checkpoint.files import CONFIG, TOKENIZER_CONFIG, Listing, companions, read_json
from featherweight.checkpoint.fit import beyond_embedding
from featherweight.checkpoint.gguf_header import read_gguf
from featherweight.errors import CheckpointError
from featherweight.model.facts import TokenizerFacts
from featherweight.store.artifact import content_digest, file_sha256


def tokenizer_facts(found: Path, rows: int | None) -> TokenizerFacts | None:
    """What the tokenizer of a folder or GGUF file does; None of one that wants code of its own to run, of which loading tells.

    Raises CheckpointError for a tokenizer that does not load, or that has ids beyond an embedding of so many rows (None: not
    known).
    """
    listing = Listing.of(found if found.is_dir() else found.parent)
    if found.is_dir() and TOKENIZER_CONFIG in listing.sizes and read_json(listing, TOKENIZER_CONFIG).get("auto_map"):
        return None
    told = judged(found) if "torch" in sys.modules else asking.asked(__name__, [str(found)], _key(found, listing))
    if "error" in told:
        raise CheckpointError(f"{found}: {told['error']}")
    if rows is not None and told["ids"] > rows:
        raise CheckpointError(f"{found}: {beyond_embedding(told['ids'] - 1, rows)}")
    lead = None if told["lead"] is None else tuple(told["lead"])
    return TokenizerFacts(lead, told["chat"])


def read_by_tokenizers(listing: Listing) -> list[str]:
    """The companions of a checkpoint that hold no weights."""
    return [name for name in companions(listing.sizes) if not name.endswith(".safetensors")]


def judged(found: Path) -> dict[str, Any]:
    """The same in this process, as JSON has it, and how many `ids` there are; or an `error`."""
    try:
        opened, ids = inspection.opened_tokenizer(found)
    except CheckpointError as error:
        return {"error": str(error).removeprefix(f"{found}: ")}
    told = {"ids": ids, "chat": tokenizer.chat_fault(opened)}
    try:
        return told | {"lead": tokenizer.framed(opened)[0]}
    except Exception:  # one that cuts texts, and does not tell what of them it has added
        return told | {"lead": None}


def _key(found: Path, listing: Listing) -> str:
    """Of all that an answer depends on: the files, the code, and the libraries. Which others there are tells only an error."""
    if found.is_dir():
        files = {name: file_sha256(found / name) for name in (CONFIG, *read_by_tokenizers(listing))}
    else:
        files = {key: value.hex() for key, value in read_gguf(listing, found.name).settings.items()}
    modules = (__file__, inspection.__file__, tokenizer.__file__, gguf_tokenizer.__file__, gguf_words.__file__)
    code = [file_sha256(Path(str(module))) for module in modules]
    return content_digest([files, code, version("transformers"), version("tokenizers")])


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment] # what Python takes for "not to be found"
    print(json.dumps(judged(Path(sys.argv[1]))))
