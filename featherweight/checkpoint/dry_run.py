"""What transformers' own loading says of the names and shapes in a checkpoint's headers, before any weight is read.

The model is built without memory and loaded with tensors without values, which takes torch: so another Python is asked, once for
the same headers; where torch is here already, this one is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featherweight.checkpoint import asking, inspection, settling
from featherweight.checkpoint.files import CONFIG
from featherweight.checkpoint.inspection import built, check_loading, load_dry, model_class, quiet
from featherweight.errors import CheckpointError
from featherweight.store.artifact import content_digest, file_sha256

MOST = 5_000
"""Tensors that are looked at so: those of a model with an expert in each of them would take a minute, and loading tells."""
TIES = ({"tie_word_embeddings": True}, {"tie_word_embeddings": False})
Shapes = Mapping[str, tuple[int, ...]]


def require_loadable(where: str, folder: Path, head: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise CheckpointError, which names `where`, for tensors that are missing, unexpected or mis-shaped by the configuration in
    `folder`, of which `head` is to be changed first (see heads.py). What it cannot build is left for loading to tell.
    """
    if len(shapes) > MOST:
        return
    given = json.dumps({"head": dict(head), "shapes": {name: list(shape) for name, shape in shapes.items()}}, sort_keys=True)
    here = "torch" in sys.modules
    told = judged(folder, given) if here else asking.asked(__name__, [str(folder)], _key(folder, given), given)
    if told.get("refused"):
        raise CheckpointError(f"{where}: {told['error']}")


def judged(folder: Path, given: str) -> dict[str, Any]:
    """The same in this process: `refused` and the `error`, or nothing. Whether the head is tied, files decide (settling.py)."""
    told = json.loads(given)
    shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
    reasons = (_complaint(folder, told["head"] | tie, shapes) for tie in ({}, *TIES))
    first = next(reasons)
    refused = first is not None and all(reason is not None for reason in reasons)
    return {"refused": True, "error": first} if refused else {}


def _complaint(folder: Path, head: Mapping[str, Any], shapes: Shapes) -> str | None:
    """What does not fit; None where all does, or something else is wrong, which loading says in a line."""
    try:
        check_loading(folder, *_loaded(folder, head, shapes))
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}: ")
    except Exception:
        return None
    return None


def _loaded(folder: Path, head: Mapping[str, Any], shapes: Shapes) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers tells of loading; of a head that is left out nothing, which may be the embedding's."""
    import torch
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):  # the shapes are those of unpacked weights
            del config.quantization_config
        for name, value in head.items():
            setattr(config, name, value)
        made = model_class(config, folder, False)
        with torch.device("meta"):
            reads = settling.names_read(list(shapes), _built(made, config, folder))
        settling.require_once(folder, reads)
        model, info = load_dry(folder, made, config, {reads[name]: shape for name, shape in shapes.items()})
    output = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    missing = [name for name in info["missing_keys"] if name.rpartition(".")[0] not in output]
    return model, {**info, "missing_keys": missing}


def _built(made: Any, config: Any, folder: Path) -> Any:
    """The model; raises CheckpointError, as loading it does, for a configuration that its class makes nothing of."""
    try:
        return made._from_config(config)
    except Exception as error:  # it can fail in as many ways as there are architectures
        raise CheckpointError(f"{CONFIG} describes no model that transformers can build: {built(error, folder)}") from error


def _key(folder: Path, given: str) -> str:
    code = [file_sha256(Path(str(module))) for module in (__file__, settling.__file__, inspection.__file__)]
    return content_digest([(folder / CONFIG).read_text(), given, code, version("transformers")])


if __name__ == "__main__":
    print(json.dumps(judged(Path(sys.argv[1]), sys.stdin.read())))
