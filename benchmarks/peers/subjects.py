"""What the peers are given: a checkpoint of one's own, or random weights in the shape of one, which tell speed and no quality."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.checkpoint.gguf import convert_gguf
from featherweight.progress import Progress

DECODER, ENCODER_DECODER = "text-generation", "text2text-generation"


@dataclass(frozen=True)
class Subject:
    """A folder that transformers opens, its task, and how many tokens its sequences may have."""

    name: str
    folder: Path
    task: str
    positions: int
    random: bool

    @property
    def recipe(self) -> str:
        """What Featherweight makes of it: a file beside this one."""
        if self.task == ENCODER_DECODER:
            return "encoder-decoder.yaml"
        return "shape.yaml" if self.random else "decoder.yaml"


def qwen2() -> Any:
    """Qwen2.5-0.5B: 494 million weights, embedding and head tied."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def t5_small() -> Any:
    """T5-small: 60.5 million weights."""
    from transformers import T5Config

    return T5Config(vocab_size=32_128, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0)


def mbart() -> Any:
    """mBART-50: 611 million weights, two fifths of them embeddings."""
    from transformers import MBartConfig

    return MBartConfig(
        vocab_size=250_054, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        scale_embedding=True, tokenizer_class="MBart50Tokenizer",
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {"qwen2.5-0.5b": qwen2, "t5-small": t5_small, "mbart-large-50": mbart}
"""The shapes that random weights are drawn in, by name."""


def subject(source: str, place: Path) -> Subject:
    """A subject: a name out of SHAPES, which is made in `place`, a folder, or a GGUF file, which is unpacked there."""
    if source in SHAPES:
        folder = _made(place / source, lambda folder: _draw(source, folder))
    elif source.endswith(".gguf"):
        folder = _made(place / Path(source).stem, lambda folder: _unpack(Path(source).absolute(), folder))
    else:
        folder = Path(source).absolute()
    if not folder.is_dir():
        raise SystemExit(f"{source} is no folder, no GGUF file and none of {', '.join(SHAPES)}")
    config = json.loads((folder / "config.json").read_text())
    task = ENCODER_DECODER if config.get("is_encoder_decoder") else DECODER
    positions = config.get("max_position_embeddings") or 1024  # T5's are relative
    return Subject(folder.name, folder, task, positions, source in SHAPES)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made where it is not there; whole or not at all."""
    if not folder.exists():
        half = folder.with_name(f"{folder.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        make(half)
        half.rename(folder)
    return folder


def _draw(name: str, folder: Path) -> None:
    """Random weights of a shape."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = SHAPES[name]()
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    told = folder / "tokenizer_config.json"  # a name that older releases of transformers, which other tools need, know too
    told.write_text(json.dumps(json.loads(told.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1))


def _tokenizer(size: int) -> Any:
    """Bytes, behind the special tokens; what is left of the vocabulary has names and is in no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<{index}>" for index in range(len(pieces), size)]
    bpe = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def _unpack(file: Path, folder: Path) -> None:
    """A GGUF file in float32, as a run of Featherweight loads it: transformers writes none that it has read."""
    folder.mkdir(parents=True)
    convert_gguf(file, folder, folder, Progress())
