"""A device that takes part in the rounds of `lp.phone_server`.

This file is self-contained: with `device.py`, a device needs only the LiteRT runtime and NumPy.
"""

from __future__ import annotations

import http.client
import json
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class PhoneClient:
    """Takes part in the rounds of `lp.phone_server` with a `DeviceTrainer`.

    Only weights and the number of examples are sent. The page of the server makes the same
    requests; `docs/android.md` shows them in Kotlin.

    Args:
        url: address of the server.
        token: the secret of this device. Defaults to None: the server gives one; keep
            `client.token` to go on as the same device.
        context: settings of TLS, for a server with a certificate of your own. Defaults to None: the
            authorities of the system.
        timeout: seconds to wait for an answer; the server averages before it answers the last
            update of a round. Defaults to 300.

    Attributes:
        token: the secret of this device.

    Raises:
        ConnectionError: the server does not answer, or refuses the device; the message is its
            reason, and `status` its HTTP status.

    Example:

    >>> client = lp.PhoneClient("http://127.0.0.1:8000")  # doctest: +SKIP
    >>> path = client.download("model.tflite")  # doctest: +SKIP
    >>> trainer = lp.DeviceTrainer(path)  # doctest: +SKIP
    >>> client.take_part(trainer, x, y)  # doctest: +SKIP
    {'round': 1, 'loss': 0.52}
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        context: ssl.SSLContext | None = None,
        timeout: float = 300,
    ) -> None:
        self._url = url.rstrip("/")
        self._context = context
        self._timeout = timeout
        self.token = token or ""
        if not token:
            self.token = str(json.loads(self._request("join", b""))["token"])

    def download(self, path: str | Path) -> Path:
        """Downloads the file of the model, and returns its path."""
        path = Path(path).expanduser()
        path.write_bytes(self._request("model.tflite"))
        return path

    def round(self) -> dict[str, Any]:
        """Returns the current round.

        Returns:
            A dict: `round`, from 1; `rounds`, how many there will be; `finished`; `takes_part`,
            whether the server waits for an update of this device; `local_epochs`; `wait`, seconds
            until it is useful to ask again.
        """
        found: dict[str, Any] = json.loads(self._request("round"))
        return found

    def take_part(
        self, trainer: Any, x: Any, y: Any, *, shuffle: bool = True
    ) -> dict[str, Any] | None:
        """Trains in the current round and sends what was learned.

        Args:
            trainer: the `DeviceTrainer` of the model.
            x: examples, as in `DeviceTrainer.fit`.
            y: labels, as in `DeviceTrainer.fit`.
            shuffle: whether to shuffle the examples in each epoch. Defaults to True.

        Returns:
            A dict with the `round` and the `loss` of the last epoch; None if there is nothing to
            do now.

        Raises:
            ConnectionError: the server refuses the update, or cannot be reached.
            ValueError: as in `DeviceTrainer.fit`.
        """
        now = self.round()
        if now["finished"] or not now["takes_part"]:
            return None
        self.load(trainer)
        losses = trainer.fit(x, y, epochs=now["local_epochs"], shuffle=shuffle, seed=now["round"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.npz"
            trainer.save_weights(path)
            update = path.read_bytes()
        self._request(f"update?round={now['round']}&examples={len(y)}", update)
        return {"round": now["round"], "loss": losses[-1]}

    def load(self, trainer: Any) -> None:
        """Loads the current weights of the server."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.npz"
            path.write_bytes(self._request("weights"))
            trainer.load_weights(path)

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(f"{self._url}/{path}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(
                request, timeout=self._timeout, context=self._context
            ) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{self._url} cannot be reached: {error}") from error


def _refusal(status: int, content: bytes) -> ConnectionError:
    try:
        reason = json.loads(content)["reason"]
    except (ValueError, KeyError, TypeError):
        reason = "no reason given"
    error = ConnectionError(f"The server refused: {reason} (status {status}).")
    error.status = status  # type: ignore[attr-defined]
    return error
