"""What an MLflow server's webhooks deliver: believed where the shared secret signed it, just now, and once.

MLflow signs as Standard Webhooks do (standardwebhooks.com): `v1,` and HMAC-SHA256 over `id.timestamp.body`, in base64.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from featherweight.errors import FeatherweightError
from featherweight.registry.versions import OURS, TAG

ID, TIME, SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
TOLERANCE_S = 300.0
EVENTS = ("model_version_alias.created", "model_version_alias.deleted", "model_version_tag.set", "model_version_tag.deleted")
"""MLflow sends none for its own stages, nor for a model's tags."""


class Refused(FeatherweightError):
    """A delivery that is not believed, and the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Deliveries:
    """Judges deliveries that a secret signs.

    One that was sent before this began is refused, so that those that were taken need not be remembered over a restart: whoever
    begins looks at everything anyway. One that was not taken may come again, as MLflow repeats it.
    """

    def __init__(self, secret: str, now: Callable[[], float] = time.time) -> None:
        self._secret, self._now = secret.encode(), now
        self._began = int(now())
        self._taken: dict[str, float] = {}

    def model(self, headers: Mapping[str, str], body: bytes) -> str:
        """The model whose alias or stage tag was moved, '' where it is none of ours. Raises Refused.

        headers: their names in small letters.
        """
        id, stamp = headers.get(ID, ""), headers.get(TIME, "")
        signed = b".".join((id.encode(), stamp.encode(), body))
        right = "v1," + base64.b64encode(hmac.new(self._secret, signed, hashlib.sha256).digest()).decode()
        if not id or not hmac.compare_digest(right.encode(), headers.get(SIGNATURE, "").encode()):
            raise Refused(401, "not signed with the secret of this receiver")
        self._refuse_old(id, stamp)
        model = _model(body)
        self._taken[id] = float(stamp)
        return model

    def _refuse_old(self, id: str, stamp: str) -> None:
        now = self._now()
        self._taken = {one: sent for one, sent in self._taken.items() if sent >= now - TOLERANCE_S}
        sent = float(stamp) if stamp.isascii() and stamp.isdigit() and len(stamp) < 16 else 0.0
        if abs(now - sent) > TOLERANCE_S or sent < self._began:
            raise Refused(403, "not sent just now")
        if id in self._taken:
            raise Refused(409, "delivered before")


def _model(body: bytes) -> str:
    """The model that a delivery's body names. Raises Refused where it is no such body."""
    try:
        told: Any = json.loads(body)
        data, entity = told["data"], told["entity"]
        name, ours = data["name"], data.get("alias") in OURS if "alias" in entity else data.get("key") == f"{TAG}stage"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(400, "not a delivery about a registered model") from error
    return str(name) if ours else ""
