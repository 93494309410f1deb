"""GGUF files as llama.cpp writes them, of the tiny Llama."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.checkpoint.files import WEIGHTS


def write_gguf(
    path: Path,
    checkpoint: Path,
    tokenizer: bool = True,
    *,
    kinds: Mapping[str, str] | None = None,
    add_bos: bool | None = True,
    parts: int = 1,
    space_prefix: bool | None = None,
    says: Mapping[str, str | int | float] | None = None,
    factors: list[float] | None = None,
    alignment: int | None = None,
) -> list[Path]:
    """Write the tiny Llama as llama.cpp's converter would: its names, rotary rows interleaved, the tokenizer inside.

    add_bos: what the file says of texts; None where it says nothing.
    kinds: GGUF's type of the matrices whose names hold a key ('' fits all). parts: files, named as gguf-split does.
    alignment: of the tensors in each file, where it is not 32.
    says: other settings. factors: of the frequencies of rotary embeddings, as Llama 3.1's file has them.
    space_prefix: instead of the checkpoint's tokenizer, one of SentencePiece's kind, and whether it begins texts with a space.
    """
    import gguf
    import numpy
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    files = [path.with_name(f"{path.stem}-{n:05}-of-{parts:05}.gguf") for n in range(1, parts + 1)] if parts > 1 else [path]
    writers = [gguf.GGUFWriter(file, "llama") for file in files]
    writer = writers[0]
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    if space_prefix is not None:
        add_sentencepiece(writer, config["vocab_size"], space_prefix)
    elif tokenizer:
        add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for key, value in (says or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    for one in writers if alignment else ():
        one.add_custom_alignment(alignment)
    for number, one in enumerate(writers if parts > 1 else ()):
        one.add_uint16("split.no", number)
        one.add_uint16("split.count", parts)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for place, (name, tensor) in enumerate(load_file(checkpoint / WEIGHTS).items()):
        array = tensor.numpy()
        count = heads.get(name.split(".")[-2])
        if count:
            array = array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        kind = next((kind for part, kind in (kinds or {}).items() if part in name and array.ndim == 2), "F32")
        kept = getattr(gguf.GGMLQuantizationType, kind)
        array = array if kind == "F32" else packed(array, kept)
        writers[place % parts].add_tensor(str(mapping.get_name(name, try_suffixes=(".weight", ".bias"))), array, raw_dtype=kept)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", numpy.array(factors, dtype=numpy.float32))
    for one in writers:
        one.write_header_to_file()
        one.write_kv_data_to_file()
        one.write_tensors_to_file()
        one.close()
    return files


def rewritten(file: Path, out: Path, says: Mapping[str, Any], left_out: str = "") -> Path:
    """The same file with other settings, or without one."""
    import gguf

    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (*says, left_out, "general.architecture"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for key, value in says.items():
        add: Any = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def packed(array: Any, kind: Any) -> Any:
    """uint8 [rows, bytes]: by the library's own quantizer, or any bytes at all that are finite numbers where it has none.

    The two upper bits of each byte are 0, so that no half-precision scale among them is infinite.
    """
    import gguf
    import numpy

    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        rows, columns = array.shape
        wide, size = gguf.GGML_QUANT_SIZES[kind]
        return numpy.random.default_rng(0).integers(0, 64, (rows, columns // wide * size), dtype=numpy.uint8)


def add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    from gguf import TokenType

    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL if number in special else TokenType.NORMAL for _, number in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def add_sentencepiece(writer: Any, rows: int, space_prefix: bool) -> None:
    """Pieces with scores, bytes, and white space that is never merged, as in Gemma's files."""
    from gguf import TokenType

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    apart = ["\n", "\n\n", "  ", "   ", "<b>"]
    merged = ["▁t", "he", "▁the", "in", "▁a", "er", "on", "▁fox", "fo", "ing", "▁f", "ox", "aa", "ab", "th", "the", "▁▁"]
    letters = list("▁abcdefghijklmnopqrstuvwxyz.é")
    kinds = {TokenType.CONTROL: special, TokenType.USER_DEFINED: apart, TokenType.BYTE: [f"<0x{n:02X}>" for n in range(256)]}
    kinds[TokenType.NORMAL] = merged + letters
    types = [kind for kind, pieces in kinds.items() for _ in pieces]
    lacking = rows - len(types)
    first = len(types) - len(merged) - len(letters)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for pieces in kinds.values() for piece in pieces] + [f"[PAD{n}]" for n in range(lacking)])
    writer.add_token_types([*types, *[TokenType.UNUSED] * lacking])
    writer.add_token_scores([-1000.0] * first + [-float(n) for n in range(rows - first)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(space_prefix)
