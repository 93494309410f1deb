"""What advice is asked about: checkpoints of well-known shapes, by their facts alone, and machines."""

from __future__ import annotations

from typing import Any

from featherweight.model.facts import CheckpointFacts, Values
from featherweight.spec import Task
from featherweight.system.gpu import Gpu
from featherweight.system.machine import Machine

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})
PLAIN = {"is_encoder_decoder": False, "pad_token_id": None, "attention_bias": False, "mlp_bias": False}


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **more: Any) -> CheckpointFacts:
    """A Llama of that shape, with the headers of its weights; a vocabulary of 32,000, tied."""
    told: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000} | PLAIN
    told |= {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "num_attention_heads": heads}
    told |= {
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    told |= more.pop("config", {})
    kv = kv_heads * hidden // heads
    sizes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    sizes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes = {f"model.layers.{i}.{name}_proj.weight": size for i in range(layers) for name, size in sizes.items()}
    shapes["model.embed_tokens.weight"] = (32000, hidden)
    kind = {"mistral": "MistralConfig", "mixtral": "MixtralConfig"}.get(told["model_type"], "LlamaConfig")
    generation = Values({"values": {}, "names": {}})
    return CheckpointFacts(Values({"class": kind, "values": told, "names": {}}), generation, more.pop("shapes", shapes), **more)


SMALL = llama(12, 768, 2048, 12, 12)  # 0.1 billion weights
ONE = llama(22, 2048, 5632, 32, 4)
EIGHT = llama(32, 4096, 14336, 32, 8)
SEVENTY = llama(80, 8192, 28672, 64, 8)


def encoder(model_type: str, architecture: str, task: Task) -> CheckpointFacts:
    """MiniLM's shape, with a head for a task."""
    told = {"model_type": model_type, "architectures": [architecture], "vocab_size": 30522, "hidden_size": 384} | PLAIN
    told |= {"num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12, "max_position_embeddings": 512}
    told |= {"encoder_classes": ["BertModel", "BertForMaskedLM"], "pad_token_id": 0, "position_embedding_type": "absolute"}
    shapes = {f"encoder.layer.{i}.attention.self.query.weight": (384, 4608) for i in range(6)}
    shapes["embeddings.word_embeddings.weight"] = (30522, 384)
    facts = CheckpointFacts(
        Values({"class": "BertConfig", "values": told, "names": {}}), Values({"values": {}, "names": {}}), shapes
    )
    assert facts.task == task
    return facts


def t5() -> CheckpointFacts:
    """T5-small's shape."""
    told = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": 512} | PLAIN
    told |= {"is_encoder_decoder": True, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 8, "d_kv": 64, "d_ff": 2048}
    told |= {"pad_token_id": 0, "tie_word_embeddings": True, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    shapes = {f"{part}.block.{i}.layer.0.a.weight": (512, 6144) for i in range(6) for part in ("encoder", "decoder")}
    shapes["shared.weight"] = (32128, 512)
    return CheckpointFacts(Values({"class": "T5Config", "values": told, "names": {}}), Values({"values": {}, "names": {}}), shapes)


def machine(gib: float = 32, gpus: int = 0, gpu_gib: float = 80, capability: tuple[int, int] = (9, 0)) -> Machine:
    return Machine("Linux", "x86_64", "some", VNNI, 8, 8, int(gib * 2**30), (Gpu("", int(gpu_gib * 2**30), capability),) * gpus)
