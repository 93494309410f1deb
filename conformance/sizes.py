"""The small numbers that configurations are told, by the names that they know them by."""

from __future__ import annotations

from typing import Any

CONTEXT, WINDOW, ORIGINAL = 256, 48, 64
"""Positions that a model was made for; how far back sliding layers see; where scaled rotary embeddings begin to be others."""
HIDDEN, HEADS, KEY_HEADS, HEAD, INNER = 128, 4, 2, 32, 192

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embed_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    "decoder_attention_heads": HEADS,
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), KEY_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "swa_head_dim"), HEAD),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **{"query_pre_attn_scalar": 48, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    **{"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 3.0},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0},
}
"""What any configuration is told that knows the name. Scalars that are neutral by default are not here."""

PART = {
    name: SIZES[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    )
}
PART |= {"layer_types": ["sliding_attention", "full_attention"], "vocab_size": 320}  # fmt: skip
"""One of the two stacks that some encoder-decoders describe each by itself."""

BYTES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
"""Each of the four parts of a model of bytes."""

SPECIAL: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 2, "expand": 2, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 2, "expand": 2, "chunk_size": 32},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "gpt_oss": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}},
    "gpt_bigcode": {"multi_query": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "m2m_100": {"decoder_start_token_id": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 256},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 100,
        "patcher_config": BYTES,
        "encoder_config": BYTES | {"num_hidden_layers": 1, "hidden_size_global": HIDDEN},
        "decoder_config": BYTES | {"hidden_size_global": HIDDEN},
        "global_config": {**BYTES, "hidden_size": HIDDEN},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 6, 4]}
            for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KEY_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "esmc": {"num_key_value_heads": HEADS},
    "flaubert": {"emb_dim": HIDDEN},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "head_dim": 8, "num_key_value_heads": HEADS, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 32},
    "perceiver": {
        "num_latents": 32, "d_latents": HIDDEN, "num_self_attends_per_block": 2,
        "num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS,
    },
    "prophetnet": {"num_encoder_layers": 2, "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "qwen_sparse_attention"], "hc_lowrank": 16,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 32, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": WINDOW},
    "reformer": {
        "attn_layers": ["local", "lsh"], "hash_seed": 0, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 96],
        "attention_head_size": HEAD, "feed_forward_size": INNER,
    },
    "rembert": {"input_embedding_size": 64, "output_embedding_size": HIDDEN},
    "squeezebert": {"embedding_size": HIDDEN},
    "xlm": {"emb_dim": HIDDEN},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "use_mamba_kernels": False},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "use_mamba_kernels": False,
        "num_key_value_heads": HEADS, "chunk_size": 32, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "t5gemma": {"encoder": PART, "decoder": PART},
}  # fmt: skip
"""What else a model type has to be told."""
