"""Loaders of CTranslate2's converter in the place of its own, where those read what transformers 5 no longer has.

Each was needed with ctranslate2 4.8 and transformers 5.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ours() -> Iterator[None]:
    """The converter with the loaders of this module in place of its own of the same configuration."""
    from ctranslate2.converters import transformers, utils

    table, permute = transformers._MODEL_LOADERS, utils.permute_for_sliced_rotary
    replaced = {"MarianConfig": _marian(), "PhiConfig": _phi()}
    before = {name: table[name] for name in replaced}
    table.update(replaced)
    # Where only a part of each head is rotary it permutes the rows of the very weights that the model computes with.
    utils.permute_for_sliced_rotary = lambda weight, *sizes: permute(weight.clone(), *sizes)
    try:
        yield
    finally:
        table.update(before)
        utils.permute_for_sliced_rotary = permute


def _marian() -> Any:
    """Marian through the loader of its siblings, where padding is a token like any other.

    CTranslate2's own cuts the last row off every embedding, which need not be padding's, and has the decoder start from zeros
    where the checkpoint starts from the padding's embedding: other probabilities, once that row has been trained.
    """
    from ctranslate2.converters import transformers

    class Marian(transformers.BartLoader):
        architecture_name = "MarianMTModel"

    return Marian()


def _phi() -> Any:
    """Phi 1 and 2 as transformers has them: CTranslate2's own loader reads the modules of code that came with the checkpoints."""
    from ctranslate2.converters import transformers, utils
    from ctranslate2.specs import common_spec, transformer_spec

    class Phi(transformers.LlamaLoader):
        architecture_name = "PhiForCausalLM"

        def get_model_spec(self, model: Any) -> Any:
            config = model.config
            shared = config.num_key_value_heads == config.num_attention_heads
            spec = transformer_spec.TransformerDecoderModelSpec.from_config(
                config.num_hidden_layers,
                config.num_attention_heads,
                pre_norm=True,
                activation=transformers._SUPPORTED_ACTIVATIONS[config.hidden_act],
                rotary_dim=0,
                rotary_interleave=False,
                parallel_residual=True,
                shared_layer_norm=True,
                num_heads_kv=None if shared else config.num_key_value_heads,
            )
            self.set_decoder(spec.decoder, model.model)
            self.set_linear(spec.decoder.projection, model.lm_head)
            return spec

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            config.bos_token, config.eos_token, config.unk_token = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token

        def set_layer_norm(self, spec: Any, module: Any) -> None:
            spec.gamma, spec.beta = module.weight, module.bias

        def set_decoder(self, spec: Any, module: Any, *_: Any) -> None:
            spec.scale_embeddings = False
            self.set_embeddings(spec.embeddings, module.embed_tokens)
            self.set_layer_norm(spec.layer_norm, module.final_layernorm)
            for layer_spec, layer in zip(spec.layer, module.layers, strict=True):
                self.set_layer_norm(layer_spec.shared_layer_norm, layer.input_layernorm)
                parts = [common_spec.LinearSpec() for _ in range(3)]
                for part, name in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
                    self.set_linear(part, getattr(layer.self_attn, name))
                utils.fuse_linear(layer_spec.self_attention.linear[0], parts)
                self.set_linear(layer_spec.self_attention.linear[1], layer.self_attn.dense)
                self.set_linear(layer_spec.ffn.linear_0, layer.mlp.fc1)
                self.set_linear(layer_spec.ffn.linear_1, layer.mlp.fc2)

    return Phi()
