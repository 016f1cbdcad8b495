"""`phone_server`: rounds of federated averaging over real devices and browsers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import keras

from keras_lp.backbones.freezing import Trainable
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.mechanism import Mechanism
from keras_lp.privacy.report import PrivacyReport
from keras_lp.tflite.contents import read_contents
from keras_lp.tflite.device.aggregation import Limit
from keras_lp.tflite.device.exchange import VERSION
from keras_lp.tflite.training.training import export_trainable_tflite
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.robust import Aggregation
from keras_lp.web.export import write_site
from keras_lp.web.rounds import Rounds, has_begun, hashed


class PhoneServer:
    """The output of `lp.phone_server`: an ASGI application.

    Attributes:
        model: the model, with the weights of the current round.
        folder: folder of the state.
    """

    def __init__(self, rounds: Rounds, local_epochs: int, requests_per_minute: int) -> None:
        self.model = rounds.model
        self.folder = rounds.folder
        self._rounds = rounds
        from keras_lp.web.application import Application  # needs Starlette

        self._application = Application(rounds, local_epochs, requests_per_minute)

    @property
    def rounds_done(self) -> int:
        """Number of rounds that are done."""
        return len(self._rounds.logs)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, or the privacy budget is spent."""
        return self._rounds.finished

    @property
    def history(self) -> dict[str, list[float]]:
        """The figures of the rounds by name, as in `keras.callbacks.History.history`.

        `clients` (updates averaged), `limited` (updates of which the norm or the weight was
        limited), `update_norm`, `seconds`, `val_*`, and with `privacy` `epsilon` and `clip`.
        """
        logs = self._rounds.logs
        names = dict.fromkeys(name for one in logs for name in one)
        return {name: [one.get(name, math.nan) for one in logs] for name in names}

    def privacy_report(self) -> PrivacyReport:
        """Returns the report of the privacy that is spent.

        Raises:
            ValueError: the server has no `privacy`.
        """
        if self._rounds.privacy is None:
            raise ValueError(
                "A privacy report needs a server with differential privacy. Received: one without. "
                "Pass `privacy=lp.DifferentialPrivacy(...)`."
            )
        return self._rounds.privacy.report()

    def close(self) -> None:
        """Frees the folder for another server."""
        self._rounds.close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, as an ASGI application."""
        await self._application.app(scope, receive, send)


def phone_server(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    clients_per_round: int,
    rounds: int,
    local_epochs: int = 1,
    trainable: Trainable = "head",
    title: str | None = None,
    description: str = "",
    validation_data: Any = None,
    round_seconds: float | None = None,
    max_clients: int = 10_000,
    tokens: Sequence[str] | None = None,
    requests_per_minute: int = 120,
    max_update_norm: Limit = "auto",
    max_weight: Limit = "auto",
    aggregation: Aggregation = "mean",
    privacy: DifferentialPrivacy | None = None,
    **options: Any,
) -> PhoneServer:
    """Returns a server that trains a model over phones and browsers, by federated averaging.

    It serves the page of `lp.export_web`, where visitors label examples and press "Take part";
    `lp.PhoneClient` is the same for a device with Python, and `docs/android.md` for Android. In a
    round, each device loads the weights, trains on its own examples and sends its weights; when
    `clients_per_round` updates have come, the server averages them and starts the next round.
    Examples never leave a device.

    An update is refused if it is malformed, too large, not finite, stale, of another model or the
    second of a client in a round. What the others send is limited as in
    `lp.aggregate_device_updates`. A device that goes away costs nothing: the round waits for
    another one, or ends after `round_seconds`.

    The state is in `folder`, and every update is on disk before the server confirms it. A server
    that was killed continues when it is started again with the same arguments; `rounds` may be
    larger then, but not with `privacy`. `model.keras` in the folder is the model after the last
    round.

    The server is an ASGI application. Run it with uvicorn, in one process; with TLS, if it is
    reachable from elsewhere, because tokens and weights are sent as they are:
    `uvicorn.run(server, host="0.0.0.0", ssl_certfile=..., ssl_keyfile=...)`. Cameras in browsers
    also need TLS.

    With `privacy`, the server adds noise as `FederatedAveraging` does: each update is clipped as a
    whole, all count alike, and the sum is divided by the expected number of clients. For each round
    it draws clients from the `max_clients` places, whether taken or not, and accepts only those. A
    round then ends after `round_seconds`. The guarantee is about the weights that the server
    publishes; the server itself sees each update.

    Args:
        model: a compiled model, as in `lp.export_trainable_tflite`. Its weights follow the rounds.
        folder: folder of the state; new, or of an earlier run of the same server.
        clients_per_round: number of updates that end a round; with `privacy` the expected number.
        rounds: number of rounds.
        local_epochs: passes of a device over its examples in a round. Defaults to 1.
        trainable: the part that trains, as in `lp.export_trainable_tflite`. Defaults to `"head"`.
        title: title of the page. Defaults to None: the name of the model.
        description: a sentence below the title. Defaults to an empty string.
        validation_data: arrays `(x, y)` or a batched `tf.data.Dataset` to evaluate after each
            round. Defaults to None: no evaluation.
        round_seconds: seconds after which a round ends with the updates that came, at least one.
            Defaults to None: a round waits for `clients_per_round`. Required with `privacy`.
        max_clients: number of clients that may join; with `privacy`, the population of the account.
            With `tokens`, it is their number. Defaults to 10,000.
        tokens: secrets of the devices that may take part, one each; a link
            `https://.../#token=...` has one. Defaults to None: whoever joins gets one, so the same
            person can take part more than once.
        requests_per_minute: limit per client, and for joining and wrong tokens per address.
            Defaults to 120.
        max_update_norm: as in `lp.aggregate_device_updates`. Defaults to `"auto"`.
        max_weight: as in `lp.aggregate_device_updates`. Defaults to `"auto"`.
        aggregation: as in `lp.aggregate_device_updates`. Defaults to `"mean"`.
        privacy: `lp.DifferentialPrivacy` for the clients. Defaults to None.
        **options: further arguments of `lp.export_web`, such as `learning_rate`, `optimizer`,
            `batch_size`, `metadata` and `card`.

    Returns:
        A `PhoneServer`, with `model`, `history`, `rounds_done`, `finished`, `privacy_report()`.

    Raises:
        ValueError: an argument does not fit, the model cannot train on a device, or the folder is
            in use or has the rounds of another model or of other settings.
        TypeError: `model` is not a Keras model.
        ImportError: a package of the extra `web`, or npm, is not installed.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> server = lp.phone_server(model, "sums_server", clients_per_round=3, rounds=5)
    >>> server.rounds_done, server.finished
    (0, False)
    >>> import uvicorn
    >>> uvicorn.run(server, host="127.0.0.1", port=8000)  # doctest: +SKIP
    >>> server.close()

    Reference: McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from
    Decentralized Data (arXiv:1602.05629).
    """
    _check_packages()
    counts = {
        "clients_per_round": clients_per_round,
        "rounds": rounds,
        "local_epochs": local_epochs,
        "max_clients": max_clients,
        "requests_per_minute": requests_per_minute,
    }
    for name, count in counts.items():
        check_positive(name, count, integer=True)
    counts = {name: int(count) for name, count in counts.items()}
    if round_seconds is not None:
        check_positive("round_seconds", round_seconds)
        round_seconds = float(round_seconds)
    check_choice("aggregation", aggregation, get_args(Aggregation))
    for name, limit in (("max_update_norm", max_update_norm), ("max_weight", max_weight)):
        if limit is not None and limit != "auto":
            check_positive(name, limit)
    _check_options(options)
    if tokens is not None:
        tokens = _checked_tokens(tokens)
        max_clients = counts["max_clients"] = len(tokens)
    _check_clients(clients_per_round, max_clients, privacy, round_seconds, aggregation)
    folder = Path(folder).expanduser()
    site = folder / "site"
    mechanism: Mechanism | None = None
    if privacy is not None:
        mechanism = Mechanism(privacy, "client", max_clients, clients_per_round, rounds)
        if not mechanism.allows():
            raise ValueError(
                "The privacy budget must allow a round. Received: "
                f"epsilon={privacy.epsilon}. Raise it, or the noise multiplier."
            )
    _validated(model, validation_data)  # raises an error now rather than after a round
    if not has_begun(folder):
        write_site(
            model,
            site,
            title=title,
            description=description,
            card=options.pop("card", None),
            feature_names=options.pop("feature_names", None),
            metadata=options.pop("metadata", None),
            trainable=trainable,
            epochs=options.pop("epochs", 10),
            server=True,
            **options,
        )
    settings = {
        **{name: count for name, count in counts.items() if name not in _MAY_CHANGE},
        "rounds": privacy and counts["rounds"],  # the noise was chosen for this number
        "round_seconds": round_seconds,
        "aggregation": [aggregation, max_update_norm, max_weight],
        "trainable": trainable,
        "tokens": tokens and sorted(map(hashed, tokens)),
        "privacy": privacy and dataclasses.asdict(privacy),
        **{name: value for name, value in options.items() if name in _TRAINING},
    }
    _, weights = read_contents((site / "model.tflite").read_bytes()).signatures["read_weights"]
    known = Rounds(
        model,
        [tensor.name for tensor in weights if tensor.name != VERSION],
        folder,
        json.loads(json.dumps(settings)),
        rounds=rounds,
        clients_per_round=clients_per_round,
        max_clients=max_clients,
        round_seconds=round_seconds,
        aggregation={
            "max_update_norm": max_update_norm,
            "max_weight": max_weight,
            "aggregation": aggregation,
        },
        privacy=mechanism,
        tokens=tokens,
        evaluate=lambda: _validated(model, validation_data),
    )
    return PhoneServer(known, local_epochs, requests_per_minute)


_MAY_CHANGE = ("rounds", "requests_per_minute")  # when a server starts again
_OF_PAGE = ("card", "epochs", "feature_names", "metadata")
_TRAINING = ("learning_rate", "optimizer", "batch_size")


def _check_clients(
    clients_per_round: int,
    max_clients: int,
    privacy: DifferentialPrivacy | None,
    round_seconds: float | None,
    aggregation: str,
) -> None:
    if clients_per_round > max_clients:
        raise ValueError(
            "`clients_per_round` must be at most the number of clients. Received: "
            f"clients_per_round={clients_per_round} for {max_clients} clients. Raise "
            "`max_clients`, or give more tokens."
        )
    if privacy is None:
        return
    if not isinstance(privacy, DifferentialPrivacy):
        raise TypeError(f"`privacy` must be lp.DifferentialPrivacy. Received: privacy={privacy!r}.")
    if aggregation != "mean":
        raise ValueError(
            "Noise is added to a mean. Received: `privacy` and "
            f"aggregation={aggregation!r}. Leave one of them out."
        )
    if round_seconds is None:
        raise ValueError(
            "Private rounds end by the clock: how many of the drawn clients answered must stay "
            "secret. Received: `privacy` without `round_seconds`. Pass for example "
            "round_seconds=3600."
        )


def _check_packages() -> None:
    try:
        import starlette  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "phone_server needs Starlette, and uvicorn to run it. Install them: "
            "pip install 'keras_lp[web]'."
        ) from error


def _check_options(options: dict[str, Any]) -> None:
    """Raises an error for unknown options, also where no page is written again."""
    known = {*inspect.signature(export_trainable_tflite).parameters, *_OF_PAGE}
    unknown = sorted(options.keys() - known | options.keys() & {"model", "path"})
    if unknown:
        raise TypeError(
            "phone_server takes the arguments of export_web and export_trainable_tflite. "
            f"Received: {unknown}. Leave them out."
        )


def _checked_tokens(tokens: Sequence[str]) -> list[str]:
    listed = [] if isinstance(tokens, str) else list(tokens)
    if (
        not listed
        or len(set(listed)) < len(listed)
        or not all(isinstance(token, str) and token and token.isascii() for token in listed)
    ):
        raise ValueError(
            "`tokens` must be a list of different ASCII strings, one for each device. Received: "
            f"{type(tokens).__name__} of {len(tokens)}. Make them with `secrets.token_urlsafe()`."
        )
    return listed


def _validated(model: keras.Model, data: Any) -> dict[str, float]:
    if data is None:
        return {}
    arguments = data if isinstance(data, tuple) else (data,)
    found = model.evaluate(*arguments, verbose=0, return_dict=True)
    return {f"val_{name}": float(value) for name, value in found.items()}
