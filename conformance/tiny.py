"""A tiny random checkpoint of any model type: its own configuration class with small numbers, and the traits that go wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.families import ALONE, families
from conformance.sizes import CONTEXT, HEAD, HEADS, HIDDEN, ORIGINAL, SIZES, SPECIAL
from featherweight.model.architecture import Family
from featherweight.model.decoding import NOT_TAKEN
from featherweight.spec import HEADED, Task
from featherweight.text.documents import Document, write_documents
from tests.support.tokenizers import byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LARGEST = 30_000_000
"""Weights of a tiny checkpoint at most."""

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
BANDS = {"short_factor": [1 + index / 10 for index in range(16)], "long_factor": [2.0 + index for index in range(16)]}
TRAITS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, rope linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "llama, rope dynamic": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}),
    "llama, rope yarn": ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}}),
    "llama, rope llama3": ("llama", {"rope_parameters": ROPE | {
        "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}}),
    "phi3, rope longrope": ("phi3", {"sliding_window": None, "original_max_position_embeddings": ORIGINAL, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL} | BANDS}),
    "qwen2, rope yarn": ("qwen2", {"use_sliding_window": False, "rope_parameters": ROPE | {
        "rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}}),
    "llama, biases, heads of 20": ("llama", {
        "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "vocab_size": 331,
        "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, heads narrower than the model": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}),
    "llama, heads of 16": ("llama", {"num_attention_heads": 8, "head_dim": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": HEAD}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, new architecture, one norm": ("falcon", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon, one part behind the other": ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "phi3, no window": ("phi3", {"sliding_window": None, "original_max_position_embeddings": CONTEXT}),
    "phi3, rope longrope, short texts": ("phi3", {
        "sliding_window": None, "original_max_position_embeddings": 200, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 200} | BANDS}),
    "phi3, half of each head rotary": ("phi3", {
        "sliding_window": None, "partial_rotary_factor": 0.5, "original_max_position_embeddings": CONTEXT}),
    "gemma2, wide window, no caps": ("gemma2", {
        "sliding_window": CONTEXT, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text, wide window": ("gemma3_text", {
        "sliding_window": CONTEXT, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gpt_neox, untwisted": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_oss, wide window": ("gpt_oss", {"sliding_window": CONTEXT}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "qwen2, window in all layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    "phi, norms of queries and keys": ("phi", {"qk_layernorm": True}),
    "stablelm, norms of queries and keys": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "gpt_neox, whole heads rotary": ("gpt_neox", {"rotary_pct": 1.0}),
    "opt, norms behind": ("opt", {"do_layer_norm_before": False}),
    "opt, embeddings narrower": ("opt", {"word_embed_proj_dim": 64}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "bloom, residuals behind norms": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "bart, scaled embeddings": ("bart", {"scale_embedding": True}),
    "bart, stacks of two sizes": ("bart", {
        "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}),
    "marian, scaled embeddings": ("marian", {"scale_embedding": True}),
    "m2m_100, no scaled embeddings": ("m2m_100", {"scale_embedding": False, "activation_function": "gelu"}),
    "pegasus, scaled embeddings": ("pegasus", {"scale_embedding": True}),
    "t5, stacks of two sizes": ("t5", {"num_layers": 3, "num_decoder_layers": 1}),
    "falcon, four times as wide": ("falcon", {"ffn_hidden_size": 4 * HIDDEN}),
    "falcon, new architecture, four times as wide": ("falcon", {
        "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 4 * HIDDEN}),
    "falcon, alibi, four times as wide": ("falcon", {
        "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True, "ffn_hidden_size": 4 * HIDDEN}),
    "qwen3, window in some layers": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3_moe, shares of the chosen": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe, a dense layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "cohere, norms of queries and keys": ("cohere", {"use_qk_norm": True}),
    "stablelm, parallel residuals": ("stablelm", {"use_parallel_residual": True}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.3}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "opt, plain norms": ("opt", {"layer_norm_elementwise_affine": False}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "llama, another activation": ("llama", {"hidden_act": "gelu"}),
    "bart, another activation": ("bart", {"activation_function": "relu"}),
    "bert, another activation": ("bert", {"hidden_act": "relu"}),
    "gpt2, another activation": ("gpt2", {"activation_function": "relu"}),
    "gpt2, wider inside": ("gpt2", {"n_inner": 320}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "deepseek_v2, keys as wide as DeepSeek's": ("deepseek_v2", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    "minicpm3, heads of 64": ("minicpm3", {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32}),
    "t5, gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}  # fmt: skip
"""Traits that no default of a model type shows: (model type, what its configuration says)."""

ANSWERING = ("bert", "distilbert", "modernbert", "roberta")
"""Encoders with a row for each head that answers a text at once, beside the one for the words under masks."""
TABLES: dict[Task, str] = {
    "feature-extraction": "MODEL_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
"""Where transformers names the class of such a head."""
TASKS: dict[Family, Task] = {"causal": "text-generation", "seq2seq": "text2text-generation", "encoder": "fill-mask"}

WITHOUT_BOS = ("gpt2", "gpt_neox", "qwen2", "qwen3", "bloom", "gptj", "codegen", "gpt_bigcode", "gpt-sw3")
"""Model types whose tokenizers put nothing before a text."""
FRAMES: dict[Family, str] = {"causal": "<s> $A", "seq2seq": "$A </s>", "encoder": "<s> $A </s>"}
TEXT = "The river and the stone met once. It was heavy, and it wanted to be light: 'What do I need?' it asked the old compiler. "


@dataclass(frozen=True)
class Case:
    """One row of the matrix: a model type, with what its configuration is told beside small numbers, and the head that it has."""

    name: str
    model_type: str
    kind: Family
    engines: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    head: Task | None = None

    @property
    def task(self) -> Task:
        """What it is for."""
        return self.head or TASKS[self.kind]


FEW = (("vllm",), ALONE)


def cases() -> list[Case]:
    """Every family as it is by default, and the traits; behind the others those that one engine alone serves."""
    known = {one.model_type: one for one in families()}
    plain = [Case(name, name, one.kind, one.engines) for name, one in known.items()]
    told = [Case(name, kind, known[kind].kind, known[kind].engines, changes) for name, (kind, changes) in TRAITS.items()]
    heads = [Case(f"{name}, {head}", name, "encoder", known[name].engines, head=head) for name in ANSWERING for head in HEADED]
    return sorted([*plain, *told, *heads], key=lambda case: (case.engines in FEW, case.kind, case.name))


def make(case: Case, folder: Path) -> Path:
    """The checkpoint of `case` in the new folder, with a tokenizer, two ends of text, and biases and norms that are not neutral."""
    import torch

    tokenizer = byte_level("$A" if case.model_type in WITHOUT_BOS else FRAMES[case.kind])
    _require_tiny(case, configuration(case, tokenizer))
    torch.manual_seed(0)
    model = spread(_class(case)(configuration(case, tokenizer)).float().eval())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _give_ends(case, model, folder, tokenizer)
    return folder


def _require_tiny(case: Case, config: PreTrainedConfig) -> None:
    """Raise ValueError where the small numbers are not those that its sizes go by."""
    import torch

    with torch.device("meta"):
        count = sum(weight.numel() for weight in _class(case)(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} weights are not tiny")


def made_with(case: Case) -> str:
    """What a checkpoint is made with: its case, its sizes, this file, and what knows its classes."""
    told = [case.name, case.model_type, case.head, sorted(case.changes.items(), key=str), version("transformers")]
    told += [SIZES, SPECIAL.get(case.model_type)]
    return hashlib.sha256(repr(told).encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def _class(case: Case) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if case.head:
        return getattr(transformers, getattr(auto, TABLES[case.head])[case.model_type])
    return getattr(transformers, next(one.architecture for one in families() if one.model_type == case.model_type))


def configuration(case: Case, tokenizer: Any) -> PreTrainedConfig:
    """Small numbers for every name that the configuration class knows."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[case.model_type]
    given: dict[str, Any] = {"vocab_size": len(tokenizer), **SIZES, **_ends(tokenizer)}
    known = {name: value for name, value in given.items() if name in _names(kind)}
    known |= {"num_key_value_heads": HEADS} if "kv_lora_rank" in known else {}  # compressed keys are each head's own
    return kind(**known | _layers(kind) | _start(case, tokenizer) | SPECIAL.get(case.model_type, {}) | dict(case.changes))


def _start(case: Case, tokenizer: Any) -> dict[str, int]:
    """What an encoder-decoder's targets begin with."""
    return {"decoder_start_token_id": tokenizer.pad_token_id} if case.kind == "seq2seq" else {}


def _ends(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _names(kind: type[PreTrainedConfig]) -> set[str]:
    """What the configuration class has a field for."""
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


def _layers(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """One layer of each kind where a model type has several, two at least."""
    if "layer_types" not in _names(kind):
        return {}
    usual = getattr(kind(), "layer_types", None) or []
    kinds = list(dict.fromkeys(usual)) if len(set(usual)) > 1 else []
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)} if kinds and "use_sliding_window" not in _names(kind) else {}


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights whose attention and logits are far from flat, norms off their neutral scale, biases off zero."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim in (2, 3) and "conv" not in name and not name.endswith(("A_log", "bias")):
                weight.normal_(0, 0.15)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
            elif "norm" in name or "ln_" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
        _spread_head(model)
    return model


def _spread_head(model: PreTrainedModel) -> None:
    """T5's own head about as a tied one is scaled: logits of many nats would tell of nothing but their size."""
    head: Any = getattr(model, "lm_head", None)
    if "t5" in model.config.model_type and hasattr(head, "weight") and not getattr(model.config, "scale_decoder_outputs", False):
        head.weight.mul_(HIDDEN**-0.5 / 2)


def _give_ends(case: Case, model: Any, folder: Path, tokenizer: Any) -> None:
    """Two ends in generation_config.json, one of which the model writes after a while."""
    import torch

    if case.kind == "encoder" or case.model_type in NOT_TAKEN:
        return
    ids = torch.tensor([tokenizer(TEXT).input_ids[:5]])
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    second = int(written[0, -1])
    path = folder / "generation_config.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(told | {"eos_token_id": [tokenizer.eos_token_id, second]}, indent=2))


def write_text(folder: Path, kind: Family) -> Path:
    """Documents of two texts each, of several lengths; with targets for an encoder-decoder."""
    bodies = [f"{TEXT * 4} {number}: {TEXT[number:]}" for number in range(12)]
    targets = [TEXT[number : number + 60] if kind == "seq2seq" else None for number in range(12)]
    write_documents(folder, [Document(str(n), body, target) for n, (body, target) in enumerate(zip(bodies, targets, strict=True))])
    return folder
