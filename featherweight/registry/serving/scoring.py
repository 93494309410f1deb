"""MLflow's scoring server of a version, as a version is served and deployed: its errors are reasons.

MLflow's own hold traces with paths of the machine, or say of a request that it cannot read nothing but "Internal Server Error".
"""

from __future__ import annotations

import os
from typing import Any

from featherweight.errors import nearest, one_line, told
from featherweight.registry.serving.reasons import plain, reason, refusal

PROGRAM = f"{__name__}:application"
JSON = (b"content-type", b"application/json")
CONVERSATIONAL = {"messages", "prompt", "input", "model"}
"""The keys of a request as OpenAI takes it that are no parameters; MLflow knows one by the first three."""


def application() -> Reasoned:
    """The server of the folder, and with the settings, that MLflow's variables name."""
    from mlflow.pyfunc import scoring_server

    model = scoring_server.load_model_with_mlflow_config(os.environ[scoring_server._SERVER_MODEL_PATH])
    strict: Any = Strict(model)
    return Reasoned(scoring_server.init(strict))


class Strict:
    """A loaded model that takes only parameters that it has: MLflow leaves others out, and answers as if they were followed."""

    def __init__(self, model: Any) -> None:
        self._model, self.metadata = model, model.metadata
        self._known = [one.name for one in getattr(self.metadata.get_params_schema(), "params", ())]

    def predict(self, data: Any, params: Any = None) -> Any:
        """What the model answers."""
        from mlflow.exceptions import MlflowException

        given = list(params) if isinstance(params, dict) else []
        if isinstance(data, dict) and not data.keys().isdisjoint(CONVERSATIONAL):  # parameters stand beside the prompt
            given += data.keys() - CONVERSATIONAL
        for name in given:
            if name not in self._known:
                way = nearest(str(name), self._known)
                raise MlflowException.invalid_parameter_value(f"no parameter '{one_line(name, 60)}'; {way}")
        return self._model.predict(data, params=params)


class Reasoned:
    """An ASGI application, of whose errors the reason is told. A request without a type is JSON."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        if all(name != JSON[0] for name, _ in scope["headers"]):
            scope = {**scope, "headers": [*scope["headers"], JSON]}
        answer = _Answer(send)
        try:
            await self._application(scope, receive, answer.send)
        except Exception as error:  # what reads a request raises what it likes
            if answer.begun:
                raise
            await refusal(400, "BAD_REQUEST", plain(f"the request cannot be read: {told(error)}"))(scope, receive, send)
            return
        if answer.status:
            await reason(answer.status, b"".join(answer.body))(scope, receive, send)


class _Answer:
    """What an application answers: passed on as it comes, but an error, which is held back. status: of that, 0 for none."""

    def __init__(self, send: Any) -> None:
        self._send, self.begun, self.status, self.body = send, False, 0, list[bytes]()

    async def send(self, message: Any) -> None:
        """Take a message of the application's."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self.status = message["status"]
        if self.status:
            self.body.append(message.get("body", b""))
            return
        self.begun = True
        await self._send(message)
