"""GGUF files, converted through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS
from featherweight.checkpoint.inspection import check_loading, quiet
from featherweight.checkpoint.saving import save_tokenizer
from featherweight.checkpoint.tensors import saving
from featherweight.errors import CheckpointError, one_line
from featherweight.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in it instead of safetensors or a pickle."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; expected a checkpoint folder, or a .gguf file")
        return path
    if not path.is_dir() or any((path / name).exists() for name in (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one, such as {path / files[0].name}")
    return files[0] if files else None


def convert_gguf(file: Path, out: Path, progress: Progress) -> None:
    """Write a GGUF file's weights, as float32 safetensors, and its tokenizer into `out`, through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is not a GGUF file (its first bytes are not 'GGUF'); copy it again")
    progress.note(f"dequantizing {file.name}")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            _set_special_tokens(tokenizer, file)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                # Without this the weights may stay packed, and the model cannot be saved.
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # the reader trusts the file: a damaged one fails anywhere
        raise CheckpointError(f"{file} cannot be read as a GGUF checkpoint: {one_line(error)}") from error
    model, info = loaded
    check_loading(file, model, info)
    with saving(out), quiet():
        save_tokenizer(tokenizer, out)
        model.save_pretrained(out, max_shard_size="5GB")


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """The special tokens that the file names; transformers 5.17 takes the first control token for EOS, and forgets padding."""
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(number)))
