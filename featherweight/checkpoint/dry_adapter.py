"""What peft's own loading says of an adapter beside its base, before any weight of the base is read.

The base is built without memory, by its config.json alone, and the adapter put beside it, and merged where it is to be. That takes
torch: so another Python is asked, once for the same files; where torch is here already, this one is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from featherweight.checkpoint import adapter_merging, asking, kept_adapters
from featherweight.checkpoint.adapter_merging import merged
from featherweight.checkpoint.files import ADAPTER, ADAPTER_WEIGHTS, CONFIG, Listing, read_header
from featherweight.checkpoint.inspection import quiet
from featherweight.checkpoint.opening import skeleton
from featherweight.errors import CheckpointError
from featherweight.store.artifact import content_digest, file_sha256

WITHOUT_VALUES = ("meta", "incompatible tensor type")
"""What torch says where something cannot be done with tensors without memory."""
Config = Mapping[str, Any]


def require_mergeable(adapter: Path, config: Config) -> None:
    """Raise CheckpointError for an adapter that cannot be merged into a base of this config.json, or not all of it."""
    _require(adapter, config, None)


def require_keepable(name: str, adapter: Path, config: Config) -> None:
    """The same for one that is to be kept beside it under a name."""
    _require(adapter, config, name)


def _require(adapter: Path, config: Config, name: str | None) -> None:
    listing = Listing.of(adapter)
    if ADAPTER_WEIGHTS[0] not in listing.sizes or config.get("auto_map"):
        return
    with tempfile.TemporaryDirectory() as base:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (Path(base) / CONFIG).write_text(json.dumps(plain))
        told = _asked(listing, Path(base), plain, name)
    if told.get("refused"):
        raise CheckpointError(str(told["error"]))


def _asked(listing: Listing, base: Path, config: Config, name: str | None) -> dict[str, Any]:
    if "torch" in sys.modules:
        return judged(base, Path(listing.where), name)
    code = [file_sha256(Path(str(module))) for module in (__file__, adapter_merging.__file__, kept_adapters.__file__)]
    told = [config, listing.read(ADAPTER, listing.sizes[ADAPTER]).decode(), read_header(listing, ADAPTER_WEIGHTS[0])]
    key = content_digest([code, told, listing.where, name, version("transformers"), version("peft")])
    return asking.asked(__name__, [str(base), listing.where, *([name] if name else [])], key)


def judged(base: Path, adapter: Path, name: str | None) -> dict[str, Any]:
    """The same in this process: `refused` and the `error`, or nothing."""
    try:
        with quiet():
            model = skeleton(base)
    except Exception:  # loading the base says it in a line
        return {}
    try:
        with warnings.catch_warnings(action="ignore"):  # that nothing is copied into what has no memory
            if name is None:
                merged(model, adapter, ADAPTER_WEIGHTS[0], safe=False)
            else:
                shapes = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
                kept_adapters.require_beside(name, Listing.of(adapter), base, shapes)
    except CheckpointError as error:
        said = str(error).replace(str(adapter), "")
        return {} if any(words in said for words in WITHOUT_VALUES) else {"refused": True, "error": str(error)}
    return {}


if __name__ == "__main__":
    print(json.dumps(judged(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)))
