"""Predictions of our models that take all that they are asked, or refuse it by name.

MLflow leaves out parameters that a model has not, and of a table whatever stands behind the first column, and answers as if that
had been followed; so a model of ours, as it is loaded, puts `Strict` in the place of MLflow's own `PyFuncModel.predict`. Models of
others in the same process are asked as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featherweight.errors import DataError, nearest, one_line
from featherweight.registry.conversation import CONTENT, ROLE

MARK = "featherweight.engine"
"""In the metadata of every model of ours."""
CONVERSATIONAL = {"messages", "prompt", "input", "model"}
"""The keys of a request as OpenAI takes it that are no parameters; MLflow knows one by the first three."""
COLUMNS = ("messages", "prompt", "text", "input")
SECOND = "text_pair"
PARAMETERS = "params"


def hold_predictions() -> None:
    """Have models of ours that MLflow has loaded, or will load, in this process take all that they are asked."""
    from mlflow.pyfunc import PyFuncModel

    model: Any = PyFuncModel
    if not isinstance(model.predict, Strict):
        model.predict = Strict(model.predict)


class Strict:
    """MLflow's method `predict`, which a model of ours is asked by once all is known to be taken."""

    def __init__(self, predict: Any) -> None:
        self._predict = predict

    def __get__(self, model: Any, kind: type) -> Any:
        """The method of a loaded model; itself where the class is asked."""
        if model is None:
            return self

        def predict(data: Any, params: Any = None) -> Any:
            if not ours(model):
                return self._predict(model, data, params)
            return self._predict(model, *whole(model.metadata, data, params))

        return predict


def ours(model: Any) -> bool:
    """Whether a model that MLflow has loaded is one of ours."""
    return MARK in (getattr(model.metadata, "metadata", None) or {})


def whole(metadata: Any, data: Any, params: Any) -> tuple[Any, Any]:
    """What a model of ours is asked, and by which parameters, so that MLflow leaves nothing out.

    Raises MLflow's own exception with our reason for a parameter that the model has not, and for a table of which it would read
    less than an answer depends on.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    known = [one.name for one in getattr(metadata.get_params_schema(), "params", ())]
    try:
        if isinstance(data, dict) and not data.keys().isdisjoint(CONVERSATIONAL):  # parameters stand beside the prompt
            beside = {name: data[name] for name in data if name not in CONVERSATIONAL}
            data = {name: value for name, value in data.items() if name not in beside}
            params = beside | params if isinstance(params, dict) else beside or params
        for name in params if isinstance(params, dict) else ():
            if name not in known:
                raise DataError(f"no parameter '{one_line(name, 60)}'; {nearest(str(name), known)}")
        of_one_column = len(metadata.get_input_schema() or ()) == 1
        return (_one_column(data, known) if of_one_column else data), params
    except DataError as error:
        raise MlflowException(one_line(error), INVALID_PARAMETER_VALUE) from error


def _one_column(data: Any, parameters: Sequence[str]) -> Any:
    """The column that holds the texts, of a table in any of MLflow's forms. Raises DataError where none or several may, and where
    another holds what an answer would depend on: a second text, or one of the model's `parameters`.
    """
    import numpy
    import pandas

    data = data.tolist() if isinstance(data, numpy.ndarray) else data
    if isinstance(data, list | tuple):
        rows = bool(data) and all(isinstance(one, dict) for one in data)
        data = pandas.DataFrame(data) if rows else pandas.DataFrame({0: pandas.Series(list(data), dtype=object)})
    if isinstance(data, dict) and data.keys().isdisjoint(CONVERSATIONAL):
        data = pandas.DataFrame({name: pandas.Series(_cells(value), dtype=object) for name, value in data.items()})
    names = list(getattr(data, "columns", data if isinstance(data, dict) else ()))
    if len(names) < 2:
        return data
    if {ROLE, CONTENT} <= set(names):
        raise DataError("messages are given as rows, which are texts each; a conversation stands under 'messages', as one list")
    named = [name for name in COLUMNS if name in names]
    if len(named) != 1:
        found = f"{' and '.join(named)} both hold texts" if named else f"none of {len(names)} columns is called as texts are"
        raise DataError(f"{found}; this model takes one: {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}")
    if SECOND in names:
        raise DataError(f"{named[0]} and {SECOND} are two texts; this model reads one of each row")
    if asked := [name for name in names if name in parameters]:
        raise DataError(f"'{asked[0]}' stands in a column beside the texts; parameters stand under '{PARAMETERS}', for all rows")
    return {named[0]: data[named[0]]} if isinstance(data, dict) else data[[named[0]]]


def _cells(value: Any) -> list[Any]:
    """Those of a column, or of one row."""
    told = value.tolist() if hasattr(value, "tolist") else value
    return list(told) if isinstance(told, list | tuple) else [told]
