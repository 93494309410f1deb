"""Tiny encoders that answer by vectors or labels: checkpoints with their files, made data, a few steps of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from featherweight.checkpoint.opening import load_config
from featherweight.checkpoint.spec import LoadSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from tests.support.families import LIKE, PLAIN_WORDS, SIZES, word_tokenizer
from tests.support.serving_models import opened

ANIMALS = ("fox", "bear", "wolf", "hare")
OTHERS = [word for word in PLAIN_WORDS if word not in ANIMALS]
TAGS = ("O", "B-ANIMAL", "I-ANIMAL")
TEXTS = ["the fox sang", "once upon a time there was a little bear in the wood and they ran", "ran", "the old hare, the wolf"]
HEADS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def head_model(model_type: str, task: str, vocabulary: int, **changes: Any) -> Any:
    """A random encoder, or decoder, of that type with the head of that task: 2 layers, 4 heads of 8 channels."""
    import torch
    import transformers

    spread = {"initializer_range": 0.1, "pad_token_id": 0, "vocab_size": vocabulary, "max_position_embeddings": 64}
    labels = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: place for place, tag in enumerate(TAGS)}}
    given = labels if task == "token-classification" else {}
    config = transformers.AutoConfig.for_model(
        model_type, **SIZES.get(LIKE.get(model_type, model_type), {}) | spread | given | changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, HEADS[task]).from_config(config).eval()


def head_checkpoint(model_type: str, task: str, folder: Path, documents: list[Document] | None = None, **changes: Any) -> Path:
    """A checkpoint of `head_model`, trained for a while on `documents` where they are given."""
    tokenizer = pair_tokenizer()
    model = head_model(model_type, task, len(tokenizer), **changes)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if documents is not None:
        fit(folder, model, documents)
        model.save_pretrained(folder)
    return folder


def pair_tokenizer() -> Any:
    """Words; a text stands between <s> and </s>, a second one ends with another </s>, and its tokens are of type 1."""
    from tokenizers import processors

    tokenizer = word_tokenizer("bert")
    ends = [("<s>", 1), ("</s>", 2)]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=ends)
    tokenizer._tokenizer.post_processor = template
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def fit(folder: Path, model: Any, documents: list[Document], steps: int = 60) -> None:
    """Train on the documents' labels."""
    import torch

    from featherweight.text.model_inputs import example_blocks
    from featherweight.training.losses import token_loss

    text = folder.parent / f"{folder.name}-text"
    write_documents(text, documents)
    blocks = example_blocks(folder, model.config, text, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        rows = torch.arange(step * 16, step * 16 + 16) % len(blocks)
        loss = token_loss(model, blocks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def sentence_files(folder: Path, normalize: bool = True, **pooling: Any) -> Path:
    """What sentence-transformers writes beside a model: the mean of all tokens, at length 1, unless told otherwise."""
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = [f"{place}_{kind}" if place else "" for place, kind in enumerate(modules)]
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(zip(paths, modules, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    told = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(told))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    return folder


def labelled(count: int, seed: int = 0) -> list[Document]:
    """Texts, each with whether it tells of an animal."""
    draw = random.Random(seed)
    found = []
    for place in range(count):
        words = draw.choices(OTHERS, k=draw.randint(3, 10))
        if place % 2:
            words[draw.randrange(len(words))] = draw.choice(ANIMALS)
        found.append(Document(f"{seed}/{place}", " ".join(words), label=place % 2))
    return found


def paired(count: int, seed: int = 0) -> list[Document]:
    """Pairs of texts, each with whether the second has a word of the first."""
    draw = random.Random(seed)
    found = []
    for place in range(count):
        words = draw.sample(OTHERS, 8)
        first, second = words[:4], words[4:]
        second[0] = first[0] if place % 2 else second[0]
        found.append(Document(f"{seed}/{place}", " ".join(first), pair=" ".join(second), label=place % 2))
    return found


def tagged(count: int, seed: int = 0) -> list[Document]:
    """Texts, each with a tag for every word: animals, alone or in a row."""
    draw = random.Random(seed)
    found = []
    for place in range(count):
        words = draw.choices([*OTHERS, *ANIMALS * 3], k=draw.randint(3, 10))
        animals = [word in ANIMALS for word in words]
        begins = [here and not before for before, here in zip([False, *animals[:-1]], animals, strict=True)]
        tags = ["O" if not here else "B-ANIMAL" if first else "I-ANIMAL" for here, first in zip(animals, begins, strict=True)]
        found.append(Document(f"{seed}/{place}", " ".join(words), label=list(tags)))
    return found


def loaded(source: Path, out: Path, task: Task) -> Path:
    """`source` as the load stage leaves it."""
    from tasks.load import load

    out.mkdir()
    load(LoadSpec(source=str(source), task=task), out=out)
    return out


def opened_vectors(folder: Path) -> Any:
    """What the engine of a served folder, PyTorch's if it has none yet, makes of TEXTS."""
    import torch

    if not (folder / "serving.json").exists():
        Serving("torch").write(folder)
    ids, types = tokens(folder, TEXTS)
    return torch.tensor(opened(folder).outputs(ids, types))[:, 0]


def tokens(folder: Path, texts: list[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and types of texts, or of pairs of them, cut to 24 tokens."""
    from featherweight.checkpoint.tokenizer import load_tokenizer
    from featherweight.text.examples import encoded, types_of

    config, tokenizer = load_config(folder), load_tokenizer(folder)
    parts = [one if isinstance(one, tuple) else (one, None) for one in texts]
    told = [encoded(config, tokenizer, first, second, 24) for first, second in parts]
    return [list(one["input_ids"]) for one in told], [types_of(one) for one in told]
