"""What transformers makes of a folder's tokenizer, before any weight is read: that it loads, which ids it gives, whether it chats.

Added tokens come from four files and from a class of transformers', so that nothing but loading tells. That takes an import of
transformers, for which another Python is asked, once for the same files; where torch is here already, this one is.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featherweight.checkpoint import asking, inspection, tokenizer
from featherweight.checkpoint.files import CONFIG, TOKENIZER_CONFIG, Listing, companions, read_json
from featherweight.checkpoint.fit import beyond_embedding
from featherweight.errors import CheckpointError
from featherweight.model.facts import TokenizerFacts
from featherweight.store.artifact import content_digest, file_sha256


def tokenizer_facts(folder: Path, rows: int | None) -> TokenizerFacts | None:
    """What the folder's tokenizer does; None of one that wants code of its own to run, of which loading tells.

    Raises CheckpointError for a tokenizer that does not load, or that has ids beyond an embedding of so many rows (None: not
    known).
    """
    listing = Listing.of(folder)
    if TOKENIZER_CONFIG in listing.sizes and read_json(listing, TOKENIZER_CONFIG).get("auto_map"):
        return None
    told = judged(folder) if "torch" in sys.modules else asking.asked(__name__, [str(folder)], _key(folder, listing))
    if "error" in told:
        raise CheckpointError(f"{folder}: {told['error']}")
    if rows is not None and told["ids"] > rows:
        raise CheckpointError(f"{folder}: {beyond_embedding(told['ids'] - 1, rows)}")
    lead = None if told["lead"] is None else tuple(told["lead"])
    return TokenizerFacts(lead, told["chat"])


def judged(folder: Path) -> dict[str, Any]:
    """The same in this process, as JSON has it, and how many `ids` there are; or an `error`."""
    try:
        opened, ids = inspection.opened_tokenizer(folder)
    except CheckpointError as error:
        return {"error": str(error).removeprefix(f"{folder}: ")}
    told = {"ids": ids, "chat": tokenizer.chat_fault(opened)}
    try:
        return told | {"lead": tokenizer.framed(opened)[0]}
    except Exception:  # one that cuts texts, and does not tell what of them it has added
        return told | {"lead": None}


def _key(folder: Path, listing: Listing) -> str:
    """Of all that an answer depends on: the files, the code, and the libraries. Which others there are tells only an error."""
    read = [name for name in companions(listing.sizes) if not name.endswith(".safetensors")]
    files = {name: file_sha256(folder / name) for name in (CONFIG, *read)}
    code = [file_sha256(Path(str(module))) for module in (__file__, inspection.__file__, tokenizer.__file__)]
    return content_digest([files, code, version("transformers"), version("tokenizers")])


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment] # what Python takes for "not to be found"
    print(json.dumps(judged(Path(sys.argv[1]))))
