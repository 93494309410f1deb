"""Tiny random models of every model type whose structure is known, and checkpoints of each family with a tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from featherweight.model.architecture import family_of
from featherweight.text.documents import Document, write_documents

FAMILIES = ("llama", "t5", "marian", "mbart", "bert", "distilbert")
"""One model type or more of each family, for what has to work with all of them."""

SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bart": {
        **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "opt": {**{"hidden_size": 32, "word_embed_proj_dim": 24, "ffn_dim": 48}, **{"num_hidden_layers": 2, "num_attention_heads": 4}},
    "qwen3_moe": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    },
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}
LIKE = {
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma"), "llama"),
    **dict.fromkeys(("mbart", "m2m_100", "marian", "pegasus"), "bart"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "electra", "mpnet"), "bert"),
    "mt5": "t5",
    "gpt_bigcode": "gpt2",
    **dict.fromkeys(("gpt_neox", "falcon", "phi"), "bert"),
}
WORDS = """
once upon a time there was little fox bear wolf hare met in the wood and they ran sang ate slept played were was glad sad
old young big small red brown under over by near tree river hill house day night number 0 1 2 3 4 5 6 7 8 9 . , !
"""
PLAIN_WORDS = [word for word in WORDS.split() if word.isalpha()]
"""Without numbers and marks."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random model of that type with its family's head: 2 layers a stack, 4 heads of 8 channels, 48 hidden channels."""
    import torch
    from transformers import AutoConfig

    from featherweight.model.architecture import auto_class

    like = LIKE.get(model_type, model_type)
    changes = ({"embedding_size": 32} if model_type == "electra" else {}) | changes
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    spread = {"init_std": 0.1} if like == "bart" else {"initializer_factor": 2.0} if like == "t5" else {"initializer_range": 0.1}
    heads = {"num_key_value_heads": 2, "head_dim": 8} if like == "llama" else {}
    config = AutoConfig.for_model(model_type, **SIZES.get(like, {}) | heads | ends | spread | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto_class(config).from_config(config).eval()


def family_checkpoint(model_type: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of `tiny_model` in `folder`, with a tokenizer of words that frames texts as its family does."""
    tokenizer = word_tokenizer(model_type)
    model = tiny_model(model_type, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def alone_inputs(model: Any, block: Any) -> dict[str, Any]:
    """What one calibration block (int64 [length]) is to `model` when it is read alone, without its padding."""
    import torch

    config = model.config
    if family_of(config) == "causal":
        return {"input_ids": block[None]}
    source, target = (part[part != config.pad_token_id] for part in block.chunk(2))
    if not config.is_encoder_decoder:
        return {"input_ids": source[None]}
    decoder = torch.cat([torch.tensor([config.decoder_start_token_id]), target[:-1]])
    return {"input_ids": source[None], "decoder_input_ids": decoder[None]}


def word_tokenizer(model_type: str) -> Any:
    """Words and single characters; an encoder's texts stand between <s> and </s>, a seq2seq model's end in </s>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *dict.fromkeys([*WORDS.split(), *"abcdefghijklmnopqrstuvwxyz"])]
    inner = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    frames = {"bert": "<s> $A </s>", "distilbert": "<s> $A </s>", "llama": "<s> $A"}
    ends = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=frames.get(model_type, "$A </s>"), special_tokens=ends)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    names |= {} if LIKE.get(model_type, model_type) in ("t5", "bart") else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=256, **names)


def sentence(start: int, length: int) -> str:
    """So many words in their order, from a place that depends on `start`."""
    return " ".join(PLAIN_WORDS[(3 * start + step) % len(PLAIN_WORDS)] for step in range(length))


def write_words(folder: Path) -> Path:
    """A text of four documents of 60 words in no order."""
    drawn = random.Random(0)
    write_documents(folder, [Document(str(i), " ".join(drawn.choices(PLAIN_WORDS, k=60))) for i in range(4)])
    return folder


def write_pairs(folder: Path) -> Path:
    """A text of 24 lines of 20 words, and of each its translation into the same words backwards."""
    lines = [sentence(start, 20) for start in range(24)]
    write_documents(folder, [Document(str(i), line, " ".join(reversed(line.split()))) for i, line in enumerate(lines)])
    return folder


def lora_folder(base: Path, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A LoRA of two kinds of matrices as peft saves one, its second factor no zeros."""
    import torch
    from peft import LoraConfig, get_peft_model

    from featherweight.runtimes.parity import load_reference

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options)
        model = get_peft_model(load_reference(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder
