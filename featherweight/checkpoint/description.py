"""A checkpoint's configuration and generation settings as transformers understands them, for a process that must not import torch.

transformers alone knows what a config.json leaves out, renames or derives, and it imports torch where it finds it. So another
Python is asked, to which torch is hidden unless a GGUF file needs it; where torch is here already, this one is. What it answered
is kept in the user's cache, by the files and the versions that it depends on: asking takes seconds.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import gguf_settings
from featherweight.checkpoint.asking import asked
from featherweight.checkpoint.files import CONFIG, Listing, read_json
from featherweight.checkpoint.gguf_header import read_gguf
from featherweight.checkpoint.gguf_settings import configuration, misplaced
from featherweight.checkpoint.inspection import built, config_refusal, quiet
from featherweight.checkpoint.opening import GENERATION, generation_config, load_config, starting_token
from featherweight.errors import CheckpointError, nearest, one_line
from featherweight.model import architecture, facts
from featherweight.model.architecture import head_refusal, medium_refusal
from featherweight.model.facts import describe
from featherweight.model.positions import rotary_kinds
from featherweight.store.artifact import content_digest, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
PLAIN_ROTATIONS = ("default", "mrope")
"""Kinds of rotary embeddings that are made without a function of their own."""


def described(folder: Path, gguf: str | None = None, *, called: str | None = None) -> dict[str, Any]:
    """`config` (see featherweight.model.facts.describe) and `generation` (values) of a folder, or of a small GGUF file in it.

    called: what an error names, where a user does not know `folder`. Raises CheckpointError where transformers makes nothing of it.
    """
    told = read(folder, gguf) if "torch" in sys.modules else _remembered(folder, gguf)
    if "error" in told:
        where = called or folder / (gguf or "config.json")
        if told.get("refused"):
            raise CheckpointError(f"{where}: {told['error']}")
        instead = "; give the folder that it was made from" if gguf else ""
        raise CheckpointError(f"{where} describes no model that transformers can build: {told['error'].rstrip('.')}{instead}")
    return told


def _remembered(folder: Path, gguf: str | None) -> dict[str, Any]:
    """The answer of before, or another process's, which is kept if it is one."""
    return asked(__name__, [str(folder), *([gguf] if gguf else [])], _key(folder, gguf))


def _key(folder: Path, gguf: str | None) -> str:
    """Of all that an answer depends on: the files, the code, and transformers."""
    named = [folder / name for name in ((gguf,) if gguf else ("config.json", GENERATION))]
    files = [gguf, *(path.read_bytes().hex() if path.is_file() else None for path in named)]
    code = [file_sha256(Path(str(module))) for module in (__file__, facts.__file__, architecture.__file__, gguf_settings.__file__)]
    return content_digest([files, code, version("transformers")])


def read(folder: Path, gguf: str | None) -> dict[str, Any]:
    """The same in this process; a reason under `error` where transformers refuses."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if reason := None if gguf else _unknown_type(folder):
        return {"error": reason}
    try:
        with quiet():
            config = _of_gguf(folder, gguf) if gguf else load_config(folder)
        if reason := medium_refusal(config) or (None if head_refusal(config) else config_refusal(config)):
            return {"error": reason, "refused": True}
        if reason := _unknown_activation(config):
            return {"error": reason}
        if unknown := rotary_kinds(config) - {*PLAIN_ROTATIONS, *ROPE_INIT_FUNCTIONS}:
            return {"error": f"it knows no rotary embeddings of the kind {min(unknown)!r} (rope_type)"}
        told = {"config": describe(config), "generation": _generation(folder, config, beside=gguf is None)}
        return json.loads(json.dumps(told, default=str))
    except CheckpointError as error:
        return {"error": one_line(error), "refused": True}
    except Exception as error:  # a config can fail in as many ways as there are architectures
        return {"error": built(error, folder)}


def _of_gguf(folder: Path, name: str) -> PreTrainedConfig:
    header = read_gguf(Listing.of(folder), name)
    config = configuration(folder, name, header)
    if reason := misplaced(config, header):
        raise CheckpointError(reason)
    return config


def _generation(folder: Path, config: Any, *, beside: bool) -> dict[str, Any]:
    """The generation settings; raises CheckpointError for some that transformers takes no text by."""
    try:
        with quiet():
            told = generation_config(folder, config, beside=beside)
            settings = dict(told.to_dict())
    except Exception as error:  # it checks them in as many ways as there are settings
        raise CheckpointError(f"transformers takes no settings such as those of {GENERATION}: {one_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False) and not head_refusal(config):
        starting_token(told)
    return settings


def _unknown_activation(config: Any) -> str | None:
    """That transformers has no function of a name that the configuration gives; its own table is in a module that imports torch."""
    source = Path(str(getattr(find_spec("transformers"), "origin", ""))).with_name("activations.py").read_text()
    table = re.search(r"^ACT2CLS = \{(.*?)^\}", source, re.M | re.S)
    known = re.findall(r'^    "(\w+)":', table[1], re.M) if table else []
    for key in ACTIVATIONS if known else ():
        name = getattr(config, key, None)
        if isinstance(name, str) and name not in known:
            return f"it knows no {key} '{name}'"
    return None


def _unknown_type(folder: Path) -> str | None:
    """That transformers has no such model type, which it says in five lines."""
    from transformers import CONFIG_MAPPING

    told = read_json(Listing.of(folder), CONFIG).get("model_type")
    if told is None or told in CONFIG_MAPPING:
        return None
    near = nearest(told, [*CONFIG_MAPPING])
    return f"transformers {version('transformers')} knows no model type '{told}'{'; ' + near if near.startswith('did') else ''}"


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.modules["torch"] = None  # type: ignore[assignment] # what Python takes for "not to be found"
    print(json.dumps(read(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)))
