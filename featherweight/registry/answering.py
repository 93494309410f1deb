"""What a registered model answers with, by the task of the checkpoint that is served: text, vectors or labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import CONFIG
from featherweight.checkpoint.opening import load_config
from featherweight.model.architecture import task_of
from featherweight.registry.generator import Generator, prompts_of
from featherweight.registry.labeller import Labeller, texts_of
from featherweight.spec import HEADED, Task

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

Answering = Generator | Labeller


def open_answering(served: Path, **config: Any) -> Answering:
    """The engine of a served folder, started. config: threads, max_tokens, max_batch, batch_window_s."""
    return (Labeller if served_task(served) in HEADED else Generator)(served, **config)


def inputs_of(answering: Answering, model_input: Any) -> list[Any]:
    """What is asked, in what MLflow hands to a model."""
    return texts_of(model_input) if isinstance(answering, Labeller) else prompts_of(model_input)


def served_task(served: Path) -> Task:
    """What the model of a served folder is for; text where no configuration lies beside it."""
    if not (served / CONFIG).is_file():
        return "text-generation"
    return task_of(load_config(served))


def signature(task: Task) -> ModelSignature:
    """What goes in and comes out, and the optional parameters.

    Texts in, or conversations (lists of messages), texts out; of encoders texts in, and out a vector for each text, the likeliest
    label with all scores, or lists of entities. Of texts or pairs of them nothing is declared: MLflow takes as many columns as a
    schema has, so that the second text of each pair would be lost without a word.
    """
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    texts = Schema([ColSpec(AnyType())])
    if task == "feature-extraction":
        vectors = Schema([TensorSpec(numpy.dtype("float32"), (-1, -1))])
        params = [ParamSpec("truncate", "boolean", True), ParamSpec("prompt_name", "string", None)]
        return ModelSignature(texts, vectors, ParamSchema(params))
    if task in HEADED:
        params = [ParamSpec("truncate", "boolean", None)]  # see Labeller
        params += [ParamSpec("aggregate", "boolean", True)] if task == "token-classification" else []
        given = None if task == "text-classification" else texts
        return ModelSignature(given, Schema([ColSpec(AnyType())]), ParamSchema(params))
    params = [ParamSpec("max_new_tokens", "long", None), ParamSpec("stop_at_end", "boolean", True)]
    params += [ParamSpec("adapter", "string", None)]
    return ModelSignature(texts, Schema([ColSpec("string")]), ParamSchema(params))
