"""A checkpoint as transformers 4.57 reads it, which is what Optimum's toolchain has.

Checkpoints saved by transformers 5 say some things in words that the older one does not know, and passes over without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featherweight.checkpoint.files import CONFIG

KEPT_IN_PARAMETERS = ("rope_theta", "partial_rotary_factor")
"""What transformers 4 has in the configuration itself, and not in `rope_scaling`."""


def mend_config(folder: Path) -> None:
    """Rewrite config.json in place, without what quantized the checkpoint."""
    path = folder / CONFIG
    told = {name: value for name, value in json.loads(path.read_text()).items() if name != "quantization_config"}
    path.write_text(json.dumps(mended(told), indent=1))


def mended(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with rotary embeddings in transformers 4's words too: `rope_theta` and `rope_scaling`."""
    if _unscaled(config):
        config = config | {"tie_word_embeddings": False}  # by which transformers 4 knows that its logits are not scaled
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return config
    scaling = {name: value for name, value in parameters.items() if name not in KEPT_IN_PARAMETERS}
    found = {name: parameters[name] for name in KEPT_IN_PARAMETERS if name in parameters}
    if config.get("model_type") == "gpt_neox" and "partial_rotary_factor" in found:
        found["rotary_pct"] = found["partial_rotary_factor"]  # the name that this one reads it by
    return config | found | {"rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}


def _unscaled(config: dict[str, Any]) -> bool:
    """Whether it is a T5 whose decoder's outputs go to the head as they are: mT5, T5 1.1 and what was made of it."""
    return config.get("model_type") == "mt5" or config.get("scale_decoder_outputs") is False
