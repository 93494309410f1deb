"""Small models of several families, and quantized checkpoints, for the tests of compile, export and parity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.grid import GRIDS, Grid
from featherweight.model.matrices import heads, matrices, move_to_grid, rows_of
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits, LoadedModel
from featherweight.runtimes.parity import load_reference
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import scoring_windows
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPTS = ["Once upon a time", "It was heavy, and", "'What"]
NEW = 12
"""What served models are asked to write on, and how many tokens."""
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
GROUPED = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
# Two heads of 16 at hidden size 72: as after pruning, and no multiple of any block. Where the hidden size is a multiple of the
# heads a pruned Llama stays a Llama ("narrow" below), whose head width CTranslate2 overlooks; it does not a Mistral's.
PRUNED = SHAPE | {"hidden_size": 72, "intermediate_size": 88, "num_attention_heads": 2, "num_key_value_heads": 1}
PRUNED |= {"head_dim": 16, "sliding_window": None}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 100, "factor": 2.56}
LONGROPE |= {"short_factor": [1 + index / 10 for index in range(8)], "long_factor": [2.0 + index for index in range(8)]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "untied": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "narrow": ("Llama", GROUPED | {"num_attention_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "pruned": ("Mistral", PRUNED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "phi3": (
        "Phi3",
        GROUPED | {"original_max_position_embeddings": 100, "sliding_window": None, "pad_token_id": 0, "rope_parameters": LONGROPE},
    ),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def make(family: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A random checkpoint of a family, biases included."""
    import torch
    import transformers

    name, shape = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(**shape | ends | {"vocab_size": len(tokenizer), "initializer_range": 0.1} | changes)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def quantize(source: Path, out: Path, grids: dict[str, str]) -> QuantizedWeights:
    """A quantized checkpoint whose weights are not those that rounding to nearest would choose.

    grids: by ending of the parameter's name, the first that fits; '' fits all. A parameter without one stays in float.
    """
    from transformers import AutoTokenizer

    model = load_reference(source)
    quantized = QuantizedWeights({}, {}, {}, "test", heads(model))
    for name, parameter, transposed in matrices(model):
        ending = next((ending for ending in grids if name.endswith(ending)), None)
        if ending is not None:
            _choose(quantized, name, rows_of(parameter, transposed), GRIDS[grids[ending]])
    save(model, quantized, out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return quantized


def _choose(quantized: QuantizedWeights, name: str, weight: Any, grid: Grid) -> None:
    """Narrower scales than the largest weight asks for, as GPTQ and QAT learn them; some of them zero rows."""
    scales = grid.scales(weight) * 0.9
    quantized.grids[name] = grid
    quantized.q[name], quantized.scales[name] = grid.quantize(weight, scales)
    quantized.q[name][1] = 0


def save(model: PreTrainedModel, quantized: QuantizedWeights, out: Path) -> None:
    """Write `model` moved to its grids, and the integers beside it."""
    move_to_grid(model, quantized)
    model.save_pretrained(out)
    quantized.write(out)


def llm_compressor(source: Path, out: Path, recipe: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`source` quantized and written to `out` by llm-compressor: the tensors, and what config.json says of them."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file

    model = load_reference(source)
    try:
        oneshot(model=model, recipe=QuantizationModifier(**recipe), **options)
        model.save_pretrained(out, save_compressed=True)
    finally:
        reset_session()
    return load_file(out / "model.safetensors"), quantization_of(out)


def quantization_of(folder: Path) -> dict[str, Any]:
    """What config.json says of quantized weights."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_text(folder: Path, text: str) -> Path:
    """A text folder of six documents."""
    write_documents(folder, [Document(str(index), text * 2) for index in range(6)])
    return folder


def serving_spec(engine: str, **keys: Any) -> Any:
    """What a recipe says of an alternative that `engine` serves, in the engine's own spec."""
    return RUNTIMES[engine].spec.model_validate({"engine": engine, **keys})


def exported(checkpoint: Path, text: Path, out: Path, **spec: Any) -> tuple[Path, dict[str, float]]:
    """What a checkpoint is served from by the engine of `spec`, and the metrics of its export."""
    from tasks.export import export

    out.mkdir()
    return out, dict(export(serving_spec(**spec), checkpoint=checkpoint, calibration=text, out=out))


def opened(folder: Path, batch: int = 8) -> LoadedModel:
    """The engine of a served folder, in this process: a worker for each would spend most of the time importing."""
    serving = Serving.read(folder)
    return RUNTIMES[serving.engine].loaded_model()(folder, serving, Limits(threads=1, max_tokens=64, max_batch=batch))


def score(engine: LoadedModel, windows: list[Window]) -> list[list[float]]:
    """Log-probabilities of the tokens of each window, given its source where it has one."""
    return engine.logprobs_given([window.ids for window in windows], [window.source for window in windows])


def windows_of(checkpoint: Path, text: Path, limit: int = 6) -> tuple[Any, list[Window]]:
    """PyTorch's model of a checkpoint, and windows of up to 32 tokens that its quality is measured on."""
    model = load_reference(checkpoint)
    return model, scoring_windows(checkpoint, model.config, text, 32, limit)


def written(checkpoint: Path, prompt: str, new: int) -> str:
    """What transformers itself writes behind a prompt, greedily and without an end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(prompt)["input_ids"]
    full = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None)[0].tolist()
    return tokenizer.decode(full, skip_special_tokens=True)[len(prompt) :]
