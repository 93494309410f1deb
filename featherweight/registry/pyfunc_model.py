"""The MLflow model of every registered variant, whichever engine serves it (models from code).

MLflow copies this file into the model and executes it to load the model; nothing of Featherweight imports it.
"""

import weakref
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from featherweight.errors import DataError, FeatherweightError, one_line
from featherweight.registry.answering import Answering, inputs_of, open_answering
from featherweight.registry.attestation import require_signed
from featherweight.registry.keys import Keys
from featherweight.registry.serving.scoring import guard


class Refusal(MlflowException):
    """Our reason as the answer to a request; MLflow would answer with a trace, or with the whole request before the reason."""

    def __init__(self, error: FeatherweightError) -> None:
        self._reason = one_line(error)
        super().__init__(self._reason, INVALID_PARAMETER_VALUE if isinstance(error, DataError) else INTERNAL_ERROR)

    @property
    def message(self) -> str:
        """The reason, whatever is to be put before it."""
        return self._reason

    @message.setter
    def message(self, value: str) -> None:
        """Nothing is put before it."""


class ServedVariant(PythonModel):
    """Text as the checkpoint's own settings ask for it, masks filled in, vectors or labels, by the engine in a process of its own.

    MLflow keeps the model object alive in a global, but its context only as long as the loaded model: so the engine belongs to the
    context, and ends with it or with this process.
    """

    def __init__(self) -> None:
        self._generators: weakref.WeakKeyDictionary[PythonModelContext, Answering] = weakref.WeakKeyDictionary()

    def load_context(self, context: PythonModelContext) -> None:
        """Start the engine, where keys are trusted here on files that one of them signed, and read a server's requests with it.

        model_config: threads, max_tokens (prompt and new ones), max_batch, batch_window_s.
        """
        served, config = Path(context.artifacts["served"]), context.model_config or {}
        require_signed(served.parents[1], Keys.here())
        guard()
        generator = open_answering(served, **config)
        weakref.finalize(context, generator.close)
        self._generators[context] = generator

    def predict(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> list[Any]:
        """What follows each prompt, or what is said next in each conversation. params: max_new_tokens, stop_at_end, adapter.

        Of encoders a vector for each text, its labels, or the entities in it. params: truncate, aggregate, prompt_name.
        """
        answering = self._generators[context]
        try:
            return answering(inputs_of(answering, model_input), **(params or {}))
        except FeatherweightError as error:
            raise Refusal(error) from error


set_model(ServedVariant())
