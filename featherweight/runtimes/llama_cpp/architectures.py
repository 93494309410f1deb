"""What llama.cpp computes of the models that are written for it: a line of facts for each of transformers' model types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SILU = ("silu", "swish")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""GELU by tanh, which ggml reads from a table in float16."""
GELU = (*TANH, "gelu")
"""The same in the place of the exact one."""
NO_BIAS = {"attention_bias": False}
NO_BIASES = {**NO_BIAS, "mlp_bias": False}
CAPS = {"attn_logit_softcapping": "add_attn_logit_softcapping", "final_logit_softcapping": "add_final_logit_softcapping"}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs, by what they do not all have in common; tried with the library of library.TESTED."""

    name: str
    """llama.cpp's."""
    interleaved: bool = False
    """It rotates neighbouring channels where transformers rotates halves: rows of queries and keys are put in that order."""
    grouped: bool = False
    """Rows of queries, keys and values lie group by group in one matrix, and are put one kind behind the other."""
    rotary: tuple[str, ...] = ("linear", "yarn")
    """The kinds of rotary embeddings that it has beside plain ones."""
    bases: bool = False
    """Layers with a window have rotary embeddings with a base of their own."""
    partial: bool = False
    """It may rotate the first channels of a head alone."""
    unrotated: int = 0
    """Each layer of so many rotates nothing."""
    square: bool = False
    """Its heads together are as wide as the model."""
    multi_head: bool = False
    """Keys have as many heads as queries."""
    norm_offset: float = 0.0
    """What its norms' weights have more than transformers'."""
    query_norm: bool = False
    """Queries have a norm, whose weights make up for another scale of attention."""
    normed: int = 0
    """From so many layers on queries and keys have norms, and with fewer none."""
    tied: bool | None = None
    """Whether the head is the embedding; None where it may be either."""
    convolves: bool = False
    """Some of its layers are convolutions, others attend."""
    windows: Literal["", "always", "told", "deep"] = ""
    """Whether some layers have a sliding window: always, where the file tells of one, with `deep` layers, or never."""
    deep: int = 0
    """With so many layers it is taken for the largest model of its authors: see `windows`, and shapes.attention_scale."""
    activations: tuple[str, ...] = SILU
    """The names of what it computes inside; the first is its own."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """What of the configuration the file says, by the writer's method for it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What in its parameters' names stands for something that `gguf` knows under another name."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """What of the configuration it computes in one way (or in those of a tuple) alone."""

    @property
    def approximates(self) -> bool:
        """Whether its activation is read from a table in float16."""
        return self.activations[0] in TANH


LLAMA = Architecture("llama", interleaved=True, rotary=("linear", "yarn", "llama3"))
FALCON = {"alibi": False, "parallel_attn": True, "bias": False}
GPT2 = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
GRANITE = {
    "logits_scaling": "add_logit_scale",
    "residual_multiplier": "add_residual_scale",
    "embedding_multiplier": "add_embedding_scale",
    "attention_multiplier": "add_attention_scale",
}
MPT = {"attn_config.softmax_scale": None, "attn_config.alibi_bias_max": 8}
ONE_DIRECTION = {"attention_bias": False, "use_bidirectional_attention": (None, False)}
EXPERTS = {"mlp_only_layers": ([], None), "decoder_sparse_step": 1}
ROUTER = {"block_sparse_moe.router": "mlp.gate", "block_sparse_moe": "mlp"}
LOGITS = {"logit_scale": "add_logit_scale"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", square=True),
    "qwen3": Architecture("qwen3", only=NO_BIAS),
    "qwen3_moe": Architecture("qwen3moe", only={**NO_BIAS, "norm_topk_prob": True, **EXPERTS}),
    "olmoe": Architecture(
        "olmoe", square=True, multi_head=True, tied=False, only={**NO_BIAS, "norm_topk_prob": False, "clip_qkv": None}
    ),
    "gemma": Architecture("gemma", norm_offset=1.0, tied=True, activations=TANH, only=NO_BIAS),
    "gemma2": Architecture(
        "gemma2", norm_offset=1.0, tied=True, windows="always", deep=46, activations=TANH, keys=CAPS, only=ONE_DIRECTION
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        query_norm=True,
        bases=True,
        windows="told",
        deep=62,
        activations=TANH,
        keys={"final_logit_softcapping": "add_final_logit_softcapping"},
        only={**ONE_DIRECTION, "attn_logit_softcapping": None},
    ),
    "phi": Architecture("phi2", square=True, tied=False, partial=True, activations=GELU, only={"qk_layernorm": False}),
    "phi3": Architecture("phi3", square=True, partial=True, rotary=("linear", "yarn", "longrope")),
    "olmo2": Architecture("olmo2", square=True, tied=False, only=NO_BIAS),
    "olmo": Architecture("olmo", interleaved=True, square=True, only=NO_BIAS, keys={"clip_qkv": "add_clamp_kqv"}),
    "olmo3": Architecture("olmo2", square=True, tied=False, windows="told", only=NO_BIAS),
    "arcee": Architecture("arcee", interleaved=True, rotary=LLAMA.rotary, activations=("relu2",), only=NO_BIASES),
    "gpt_bigcode": Architecture("starcoder", square=True, activations=GELU, only={"multi_query": True}),
    "jais2": Architecture("jais2", activations=("relu2",), only={"attention_bias": True, "mlp_bias": True}),
    "glm": Architecture("chatglm", square=True, partial=True),
    "qwen2_moe": Architecture("qwen2moe", square=True, tied=False, only={"norm_topk_prob": False, **EXPERTS}),
    "granitemoe": Architecture(
        "granitemoe",
        interleaved=True,
        rotary=LLAMA.rotary,
        keys=GRANITE,
        names=ROUTER,
    ),
    "ministral": LLAMA,
    "lfm2": Architecture(
        "lfm2",
        convolves=True,
        keys={"conv_L_cache": "add_shortconv_l_cache", "norm_eps": "add_layer_norm_rms_eps"},
        only={"conv_bias": False},
    ),
    "granite": Architecture("granite", interleaved=True, rotary=LLAMA.rotary, keys=GRANITE),
    "smollm3": Architecture("smollm3", interleaved=True, unrotated=4, only=NO_BIASES),
    "starcoder2": Architecture("starcoder2", square=True, activations=GELU, only={"use_bias": True}),
    "gpt2": Architecture("gpt2", square=True, activations=GELU, only=GPT2),
    "gpt_neox": Architecture(
        "gptneox", grouped=True, square=True, tied=False, partial=True, activations=GELU, only={"attention_bias": True}
    ),
    "stablelm": Architecture("stablelm", square=True, tied=False, partial=True, only={"qk_layernorm": False}),
    "cohere": Architecture("command-r", square=True, tied=True, normed=64, keys=LOGITS, only=NO_BIAS),
    "cohere2": Architecture("cohere2", square=True, tied=True, windows="always", keys=LOGITS, only=NO_BIAS),
    "exaone4": Architecture("exaone4", square=True, windows="deep", deep=64, rotary=LLAMA.rotary),
    "glm4": Architecture("glm4", partial=True),
    "ernie4_5": Architecture("ernie4_5", only={"use_bias": False}),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", only=NO_BIAS),
    "seed_oss": Architecture("seed_oss", only={"attention_out_bias": False, "mlp_bias": False}),
    "nemotron": Architecture("nemotron", square=True, norm_offset=1.0, tied=False, partial=True, activations=("relu2",)),
    "mpt": Architecture("mpt", square=True, activations=GELU, only=MPT),
    "bloom": Architecture(
        "bloom", grouped=True, square=True, activations=GELU, only={"apply_residual_connection_post_layernorm": False}
    ),
    "falcon": Architecture("falcon", grouped=True, square=True, activations=GELU, only=FALCON),
}
"""By transformers' model type (SmolLM and SmolLM2 are Llamas)."""
