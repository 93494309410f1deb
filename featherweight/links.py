"""Files that a served folder takes over unchanged.

Weight files are hard-linked, so that they lie on disk once; nothing ever writes to one in place. All others are copied: they are
small, and whoever edits a configuration in a served folder must not edit the checkpoint's through a shared inode.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from featherweight.checkpoint import COMPANIONS, CONFIG, TOKENIZERS, Listing, find_weights, needed_files


def link(source: Path, target: Path) -> None:
    """`source` again at the new path `target`; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def copy_tokenizer(checkpoint: Path, out: Path) -> None:
    """The tokenizer's files, and the configuration by which transformers knows its class. Replaces what is there."""
    for name in (CONFIG, *TOKENIZERS, *COMPANIONS):
        if (checkpoint / name).is_file():
            _copy(checkpoint / name, out / name)


def link_checkpoint(checkpoint: Path, out: Path) -> None:
    """Everything that transformers loads: configuration, weights, tokenizer. Not a quantize stage's integers."""
    listing = Listing.of(checkpoint)
    weights = find_weights(listing)
    for name in needed_files(listing, weights):
        (link if name in weights.files else _copy)(checkpoint / name, out / name)


def _copy(source: Path, target: Path) -> None:
    """A new file: never the bytes of whatever inode `target` shares."""
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
