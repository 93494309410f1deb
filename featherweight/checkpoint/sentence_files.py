"""What sentence-transformers writes beside a model: what kind it made of it, and the modules behind the base model.

Read as its release 6.2 reads them: https://github.com/huggingface/sentence-transformers, base/model.py and the modules' own files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.checkpoint.files import TOKENIZER_CONFIG, Listing, check_length, read_json, read_list
from featherweight.checkpoint.fit import misfit
from featherweight.errors import CheckpointError
from featherweight.model.heads import DENSE, LAYERS, POOLINGS, Dense, SentenceEmbedding
from featherweight.model.positions import context_tokens

MODULES, MODEL = "modules.json", "config_sentence_transformers.json"
SETTINGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""What the settings of the first module were called over time; the first that says anything counts."""
EMBEDS, SCORES = "SentenceTransformer", "CrossEncoder"
"""What it makes of a model, and is known here: vectors of texts, and scores of pairs."""
OWN = "sentence_transformers."
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How releases before 5.2 named the modes of a Pooling module, in the order in which several are put end to end."""
FLAG = "pooling_mode_"
USUAL_PROMPTS = ("query", "document")
"""Those that every model has, empty where its files say no more."""
READ, VECTOR = "last_hidden_state", "sentence_embedding"


def made(listing: Listing) -> str | None:
    """What sentence-transformers made of the model in the folder; None where it did not save it.

    Raises CheckpointError for what is not known here.
    """
    if MODULES not in listing.sizes:
        return None
    kind = str(_json(listing, MODEL).get("model_type") or EMBEDS)
    if kind not in (EMBEDS, SCORES):
        raise CheckpointError(
            f"{listing.where}: sentence-transformers saved it as a {kind}, which is not known here; known: {EMBEDS}, {SCORES}"
        )
    return kind


def embedding(listing: Listing, config: Any) -> SentenceEmbedding:
    """How a text's vector is made; raises CheckpointError for a module, or a setting of one, that is not known here."""
    pooling: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalize, prompts = False, named_prompts(listing)
    for kind, path, told in _modules(listing):
        of_vector = told.get("module_input_name", VECTOR) == told.get("module_output_name", VECTOR) == VECTOR
        if kind == "Pooling" and not dense:
            pooling, normalize = _poolings(told, listing.where, prompted=any(prompts.values())), False
        elif kind == "Normalize" and of_vector:
            normalize = bool(pooling)
        elif kind == "Dense" and of_vector and pooling and not normalize:
            dense.append(_dense(listing, path, told))
        elif kind != "Dropout":  # which does nothing outside of training
            raise _unknown(listing, kind, "Pooling, Dense, Normalize, Dropout, in that order")
    if not pooling:
        raise CheckpointError(f"{listing.where}/{MODULES} names no Pooling module, without which a text has no vector")
    _require_widths(listing, dense, len(pooling) * (getattr(config.get_text_config(), "hidden_size", None) or 0))
    said, prompt = _settings(listing), default_prompt(listing)
    longest, lower = _longest(listing, config, said), bool(said.get("do_lower_case"))
    return SentenceEmbedding(pooling, normalize, longest, lower, prompt, tuple(dense), prompts, width=_width(listing))


def _width(listing: Listing) -> int | None:
    """How many of a vector's numbers are kept, which nothing normalizes again."""
    width = _json(listing, MODEL).get("truncate_dim")
    if width is not None and not (type(width) is int and width > 0):
        raise CheckpointError(f"{listing.where}/{MODEL}: truncate_dim is {width!r}, and must be a whole number above 0, or null")
    return width


def _require_widths(listing: Listing, dense: Sequence[Dense], width: int) -> None:
    """Raise CheckpointError for layers whose tensors are missing, or do not fit one another; width: of what is pooled, 0 where it
    is not known.
    """
    for one in dense:
        shapes = {name: tuple(entry["shape"]) for name, entry in check_length(listing, f"{one.path}/{DENSE}").items()}
        where, told = f"{listing.where}/{one.path}/{DENSE}", _json(listing, f"{one.path}/config.json")
        rows, columns = (*shapes.get("linear.weight", ()), 0, 0)[:2]
        wanted: dict[str, tuple[Any, ...]] = {}
        wanted["linear.weight"] = (told.get("out_features", rows), width or told.get("in_features", columns))
        wanted |= {"linear.bias": (rows,)} if told.get("bias", True) else {}
        wanted |= {"residual.weight": (rows, columns)} if one.residual and rows != columns else {}
        if wrong := misfit(shapes, wanted):
            name, found, asked = wrong
            raise CheckpointError(
                f"{where}: {name} has the shape {found}, and its config.json, behind a vector of {width or columns}, asks for "
                f"{asked}; they do not belong together"
            )
        width = rows


def _dense(listing: Listing, path: str, told: Mapping[str, Any]) -> Dense:
    """A layer behind the pooling, whose weights the checkpoint carries."""
    where = f"{listing.where}/{path}"
    activation = str(told.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if name not in LAYERS or not activation.startswith("torch."):
        raise CheckpointError(f"{where}: its activation {activation} is not known here; known: {', '.join(LAYERS)}")
    if f"{path}/{DENSE}" not in listing.sizes:
        raise CheckpointError(f"{where} has no {DENSE}, a pickle at most; save it anew by sentence-transformers, which writes one")
    return Dense(path, name, bool(told.get("use_residual")))


def longest(listing: Listing, config: Any) -> int:
    """The longest text where sentence-transformers says nothing: what both the positions and the tokenizer allow."""
    told = _json(listing, TOKENIZER_CONFIG).get("model_max_length")
    return int(min(context_tokens(config), told or 2**31))


def activation(listing: Listing) -> dict[str, Any]:
    """What a cross-encoder's config.json has to say of its activation, where it was saved in another file.

    Raises CheckpointError for a module behind the model, which is not known here.
    """
    if (kind := next((kind for kind, _, _ in _modules(listing)), None)) is not None:
        raise _unknown(listing, kind, "none behind a cross-encoder")
    if default_prompt(listing):
        raise CheckpointError(f"{listing.where}/{MODEL}: a cross-encoder with a prompt of its own is not taken here")
    _settings(listing, task="sequence-classification", read="logits")
    named = _json(listing, MODEL).get("activation_fn")
    return {"sentence_transformers": {"activation_fn": named}} if named else {}


def default_prompt(listing: Listing) -> str:
    """What is put before every text. Raises CheckpointError for the name of no prompt, which that library refuses too."""
    known, name = dict.fromkeys(USUAL_PROMPTS, "") | named_prompts(listing), _json(listing, MODEL).get("default_prompt_name")
    if name and name not in known:
        raise CheckpointError(
            f"{listing.where}/{MODEL}: default_prompt_name is {name!r}, and there is no such prompt; known: {', '.join(known)}"
        )
    return known[name] if name else ""


def named_prompts(listing: Listing) -> dict[str, str]:
    """What may be put before a text, by name."""
    told = _json(listing, MODEL).get("prompts") or {}
    if not isinstance(told, dict) or not all(isinstance(prompt, str | None) for prompt in told.values()):
        raise CheckpointError(f"{listing.where}/{MODEL}: prompts must be an object of texts by their names")
    return {str(name): prompt or "" for name, prompt in told.items()}


def _json(listing: Listing, name: str) -> dict[str, Any]:
    return read_json(listing, name) if name in listing.sizes else {}


def _modules(listing: Listing) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, folder and settings of each module behind the first, which must be the model itself."""
    listed = [(str(module.get("type")), str(module.get("path"))) for module in read_list(listing, MODULES)]
    first = listed[0][0] if listed else ""
    if not (first.startswith(OWN) and first.endswith(".Transformer")):
        kind = first.rpartition(".")[2] or "no"
        raise CheckpointError(
            f"{listing.where}: sentence-transformers' {kind} module stands in the place of a model, which is not known here"
        )
    names = ((kind.rpartition(".")[2] if kind.startswith(OWN) else kind, path) for kind, path in listed[1:])
    return [(kind, path, _json(listing, f"{path}/config.json")) for kind, path in names]


def _unknown(listing: Listing, kind: str, known: str) -> CheckpointError:
    return CheckpointError(
        f"{listing.where}: its answers go through sentence-transformers' {kind} module, which is not known here; known: {known}"
    )


def _settings(listing: Listing, task: str = "feature-extraction", read: str = READ) -> dict[str, Any]:
    """Those of the first module. Raises CheckpointError for one that gives another answer than is given here."""
    name, said = next(((name, told) for name in SETTINGS if (told := _json(listing, name))), ("", {}))
    modes = said.get("modality_config") or {"text": {"method_output_name": read}}
    other = next((key for key in ("tokenizer", "config") for key in (f"{key}_args", f"{key}_kwargs") if said.get(key)), None)
    other = other or ("processing_kwargs" if said.get("processing_kwargs") else None)
    if said.get("transformer_task", task) != task:
        other = "transformer_task"
    if (modes.get("text") or {}).get("method_output_name") != read or "message" in modes:
        other = "modality_config"
    if other:
        raise CheckpointError(f"{listing.where}/{name}: {other} asks for what is not done here; save the model without it")
    return said


def _poolings(said: Mapping[str, Any], where: str, *, prompted: bool) -> tuple[str, ...]:
    """The modes of a Pooling module: named, as releases from 5.2 on write them, else flags, else the mean."""
    if said.get("include_prompt") is False and prompted:
        raise CheckpointError(f"{where}: its pooling leaves the prompt out (include_prompt false), which is not done here")
    named = said.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or ())
    modes = modes or [mode for flag, mode in FLAGS.items() if said.get(flag)] or ["mean"]
    strange = (key.removeprefix(FLAG) for key, on in said.items() if key.startswith(FLAG) and key not in FLAGS and on)
    unknown = [*(mode for mode in modes if mode not in POOLINGS), *strange]
    if unknown:
        raise CheckpointError(f"{where}: pooling '{', '.join(map(str, unknown))}' is not known here; known: {', '.join(POOLINGS)}")
    return tuple(modes)


def _longest(listing: Listing, config: Any, said: Mapping[str, Any]) -> int:
    """Where a text is cut. Raises CheckpointError for what is no length, which tokenizers stop at."""
    told = said.get("max_seq_length")
    if told is not None and not (type(told) is int and told >= 0):
        raise CheckpointError(
            f"{listing.where}: sentence-transformers' max_seq_length is {told!r}, and must be a whole number, or null"
        )
    return told or longest(listing, config)
