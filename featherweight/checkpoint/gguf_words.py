"""How llama.cpp cuts a text into words before byte-level BPE merges their letters, by the name that a GGUF file has for it.

transformers 5.17 takes no notice of that name (`tokenizer.ggml.pre`): it cuts what is called a Llama as GPT-2 does, so that Llama 3
would read other tokens than it was trained on. The expressions are those of llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from typing import Any

SHORT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""What is left of is, not, are, have, am, will and had behind an apostrophe."""
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _modern(numbers: str) -> str:
    return rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"


def _cased(short: str, numbers: str) -> str:
    begin, end = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}", f"{LOWER}"
    return rf"{begin}*{end}+{short}|{begin}+{end}*{short}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"


THREE, ONE = r"\p{N}{1,3}", r"\p{N}"
CUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "chatglm-bpe"): (_modern(THREE),),
    ("qwen2", "deepseek-r1-qwen", "stablelm2"): (_modern(ONE),),
    ("gpt-2", "phi-2", "olmo", "jais", "mpt"): (GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (ONE, GPT2),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", ONE),
    ("tekken",): (_cased("", ONE),),
    ("gpt-4o", "llama4"): (_cased(f"{SHORT}?", THREE),),
}
"""Expressions by names: the text is cut by the first, each part by the next."""
WHOLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Those of which a word that is a token is that token, however its merges go."""


def name_of(said: str | None, architecture: str) -> str:
    """The name of a file's way to cut; of one of before there were names, that of the models of its architecture."""
    return said or ("qwen2" if architecture.startswith("qwen") else "gpt-2")


def cuts_of(name: str) -> tuple[str, ...] | None:
    """The expressions of a name; None where it is not known."""
    return next((cuts for names, cuts in CUTS.items() if name in names), None)


def cut_as_named(tokenizer: Any, name: str) -> None:
    """Have a byte-level tokenizer of the tokenizers library cut as that name says, which is one of CUTS."""
    from tokenizers import Regex, decoders, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts_of(name) or ()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.model.ignore_merges = name in WHOLE
