"""A checkpoint made on the spot: a Llama with random weights, and the tokenizer of another checkpoint.

Usage: python -m infra.gpu_check.made TOKENIZER OUT [--layers 24 --hidden 1024]
"""

from __future__ import annotations

import argparse
from pathlib import Path


def make(tokenizer: Path, out: Path, layers: int, hidden: int) -> int:
    """Write it; the number of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from featherweight.checkpoint.tokenizer import load_tokenizer

    cutter = load_tokenizer(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(cutter), hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=cutter.bos_token_id, eos_token_id=cutter.eos_token_id, pad_token_id=cutter.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    cutter.save_pretrained(out)
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    given = parser.parse_args()
    print(f'{{"state": "ok", "found": "{make(given.tokenizer, given.out, given.layers, given.hidden):,} weights"}}')
