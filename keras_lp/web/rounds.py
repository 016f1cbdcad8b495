"""The rounds of a phone server: clients, updates and results, kept in a folder."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_lp.privacy.mechanism import Mechanism
from keras_lp.tflite.device.aggregation import (
    Refused,
    Stale,
    aggregate_device_updates,
    assign,
    current_weights,
    flat,
    read_update,
)
from keras_lp.tflite.device.device import VERSION, read_arrays, write_weights
from keras_lp.tflite.device.exchange import HALF, find_weights

_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS clients (number INTEGER PRIMARY KEY, token TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY, started REAL, chosen TEXT, privacy TEXT, logs TEXT
);
CREATE TABLE IF NOT EXISTS updates (
    round INTEGER, client INTEGER, examples INTEGER, PRIMARY KEY (round, client)
);
"""

Logs = dict[str, float]


class NotTaken(Exception):  # noqa: N818
    """Raised for an update that does not count.

    Args:
        status: the HTTP status.
        reason: the reason, for the device.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Rounds:
    """The rounds of a model over devices. Every step is on disk before it is told to anybody.

    Args:
        model: the model; its weights are those of the current round.
        weights: the names of the exchanged weights.
        folder: folder of the state.
        settings: what must stay the same when the server starts again, JSON values by name.
        rounds: number of rounds.
        clients_per_round: number of updates that end a round.
        max_clients: number of clients that may join.
        round_seconds: seconds after which a round ends with the updates that came; None waits.
        aggregation: arguments of `lp.aggregate_device_updates`.
        privacy: the mechanism of differential privacy, or None.
        tokens: the tokens of the clients; None gives tokens to those that join.
        evaluate: returns figures of the model for the logs.

    Raises:
        ValueError: if the folder is of another model or of other settings, or is in use.

    Attributes:
        model: the model.
        folder: folder of the state.
        rounds: number of rounds.
        logs: the figures of the rounds that are done.
    """

    def __init__(
        self,
        model: keras.Model,
        weights: Sequence[str],
        folder: Path,
        settings: Mapping[str, Any],
        *,
        rounds: int,
        clients_per_round: int,
        max_clients: int,
        round_seconds: float | None,
        aggregation: Mapping[str, Any],
        privacy: Mechanism | None,
        tokens: Sequence[str] | None,
        evaluate: Callable[[], Logs],
    ) -> None:
        self.model = model
        self.folder = folder
        self.rounds = rounds
        self._clients_per_round = clients_per_round
        self._max_clients = max_clients
        self._round_seconds = round_seconds
        self._aggregation = dict(aggregation)
        self._evaluate = evaluate
        self._tokens = tokens
        self._lock = threading.RLock()
        self._spent = False  # the privacy budget
        self.logs: list[Logs] = []
        self._versions: dict[tuple[str, ...], np.ndarray] = {}
        exchanged = find_weights(model, weights)
        if exchanged is None:
            raise ValueError(f"The model must have the weights {list(weights)[:3]}.")
        self._exchanged = exchanged
        self._privacy = privacy
        self._updates = folder / "updates"
        self._updates.mkdir(parents=True, exist_ok=True)
        self._database = _open(folder / "state.sqlite3")
        try:
            self._begin(settings)
        except BaseException:
            self.close()
            raise

    @property
    def number(self) -> int:
        """The current round, from 1."""
        return len(self.logs) + 1

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, or the privacy budget is spent."""
        return self.number > self.rounds or self._spent

    @property
    def privacy(self) -> Mechanism | None:
        """The mechanism of differential privacy, None without."""
        return self._privacy

    @property
    def largest_update(self) -> int:
        """The most bytes of an update."""
        sizes = [4 * int(np.prod(v.shape)) for v in self._exchanged.values()]
        return sum(sizes) + 4096 * (len(sizes) + 2)

    def weights_path(self) -> Path:
        """Returns the file with the weights of the current round."""
        return self._weights_path(self.number)

    def join(self) -> str:
        """Adds a client and returns its token.

        Raises:
            NotTaken: if the tokens are given, or there are enough clients.
        """
        if self._tokens is not None:
            raise NotTaken(403, "this server gives no tokens; ask for a link with one")
        token = secrets.token_urlsafe(32)
        with self._lock:
            if self._one("SELECT count(*) FROM clients") >= self._max_clients:
                raise NotTaken(403, f"all {self._max_clients} places are taken")
            with self._database:
                self._database.execute("INSERT INTO clients (token) VALUES (?)", (hashed(token),))
        return token

    def client(self, token: str) -> int:
        """Returns the number of a client.

        Raises:
            NotTaken: if nobody has this token.
        """
        found = self._one("SELECT number FROM clients WHERE token = ?", hashed(token))
        if found is None:
            raise NotTaken(401, "this token is unknown here; join first")
        return int(found)

    def current(self, client: int) -> dict[str, Any]:
        """Returns what a client must know about the current round."""
        with self._lock:
            self._close_if_complete()
            takes_part = not self.finished and self._obstacle(client, self.number) is None
            return {
                "round": min(self.number, self.rounds),
                "rounds": self.rounds,
                "finished": self.finished,
                "takes_part": takes_part,
            }

    def check(self, client: int, number: int) -> None:
        """Checks that an update would count, before it is read.

        Raises:
            NotTaken: if not.
        """
        with self._lock:
            self._close_if_complete()
            if self.finished:
                raise NotTaken(409, "all rounds are done")
            if number != self.number:
                raise NotTaken(409, f"it is stale: round {self.number} is running")
            obstacle = self._obstacle(client, number)
            if obstacle is not None:
                raise obstacle

    def receive(self, client: int, number: int, examples: int, path: Path) -> None:
        """Takes an update, and ends the round if it is complete.

        Args:
            client: number of the client.
            number: the round that it belongs to.
            examples: how many examples the client trained on.
            path: the file, which is moved.

        Raises:
            NotTaken: if the update does not count.
        """
        with self._lock:
            self.check(client, number)
            try:
                read = read_update(self.model, path, self._versions)
                if read.keys() != self._exchanged.keys():
                    raise Refused("it has other weights than this model trains")
            except Refused as reason:
                status = 409 if isinstance(reason, Stale) else 422
                raise NotTaken(status, str(reason)) from reason
            path.replace(self._update_path(number, client))
            with self._database:
                self._database.execute(
                    "INSERT INTO updates VALUES (?, ?, ?)", (number, client, examples)
                )
            self._close_if_complete()

    def close(self) -> None:
        """Frees the folder."""
        self._database.close()

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """Starts the first round, or continues."""
        weights = current_weights(self.model, self._exchanged)
        own = {**settings, "model": weights[VERSION][:HALF].tolist()}
        found = self._about("settings")
        if found is None:
            write_weights(self._weights_path(1), weights)
            with self._database:
                self._tell("settings", own)
                for token in self._tokens or ():
                    self._database.execute(
                        "INSERT INTO clients (token) VALUES (?)", (hashed(token),)
                    )
                self._start_round(1)
            return
        wrong = sorted(name for name in {*own, *found} if own.get(name) != found.get(name))
        if wrong:
            raise ValueError(
                "`folder` must hold the rounds of this model with the same settings. Received: "
                f"{self.folder}, where these differ: {wrong}. Choose another folder."
            )
        rows = self._database.execute(
            "SELECT logs FROM rounds WHERE logs IS NOT NULL ORDER BY number"
        )
        self.logs = [json.loads(row) for (row,) in rows]
        self._spent = bool(self._about("spent"))
        arrays = read_arrays(self._weights_path(self.number))
        assign(self.model, self._exchanged, flat({name: arrays[name] for name in self._exchanged}))
        if self._privacy is not None:
            state = self._one("SELECT privacy FROM rounds ORDER BY number DESC LIMIT 1")
            self._privacy.restore(json.loads(state))
        if self.logs:
            self._save_model()
        self._forget_lost_updates()
        self._remove_files()
        self._close_if_complete()

    def _start_round(self, number: int) -> None:
        """Starts a round, in a transaction of the caller."""
        chosen = privacy = None
        if self._privacy is not None and number <= self.rounds:
            if self._privacy.allows():
                self._privacy.start()
                chosen = json.dumps(self._privacy.sample().tolist())
            else:
                self._spent = True
                self._tell("spent", True)
        if self._privacy is not None:
            privacy = json.dumps(self._privacy.state())
        self._database.execute(
            "INSERT INTO rounds VALUES (?, ?, ?, ?, NULL)", (number, time.time(), chosen, privacy)
        )

    def _obstacle(self, client: int, number: int) -> NotTaken | None:
        """Returns why a client does not take part in the running round."""
        if self._one("SELECT 1 FROM updates WHERE round = ? AND client = ?", number, client):
            return NotTaken(409, f"it already sent an update in round {number}")
        chosen = self._one("SELECT chosen FROM rounds WHERE number = ?", number)
        if chosen is not None and client - 1 not in json.loads(chosen):
            return NotTaken(403, f"it was not drawn for round {number}")
        return None

    def end_if_due(self) -> None:
        """Ends the running round if it is complete or its time is over."""
        with self._lock:
            self._close_if_complete()

    def _close_if_complete(self) -> None:
        if self.finished:
            return
        number = self.number
        count = self._one("SELECT count(*) FROM updates WHERE round = ?", number)
        started = self._one("SELECT started FROM rounds WHERE number = ?", number)
        late = self._round_seconds is not None and time.time() > started + self._round_seconds
        if self._privacy is not None:
            # Ends by the clock: an early end would tell how many of the drawn clients answered.
            complete = late and self._one("SELECT 1 FROM clients LIMIT 1") is not None
        else:
            complete = count >= self._clients_per_round or (late and count > 0)
        if not complete:
            return
        before = flat(self._exchanged)
        state = None if self._privacy is None else self._privacy.state()
        try:
            self._close(number, before)
        except BaseException:
            if len(self.logs) < number:  # the round is still open, with the weights before it
                assign(self.model, self._exchanged, before)
                self._versions.clear()
                if self._privacy is not None and state is not None:
                    self._privacy.restore(state)
            raise

    def _close(self, number: int, before: np.ndarray) -> None:
        """Averages the updates of a round and starts the next one."""
        rows = self._database.execute(
            "SELECT client, examples FROM updates WHERE round = ? ORDER BY client", (number,)
        ).fetchall()
        paths = [self._update_path(number, client) for client, _ in rows]
        privacy = self._privacy
        logs: Logs = {}
        if privacy is None:
            robust = self._aggregation.get("aggregation", "mean") != "mean"
            examples = None if robust else [examples for _, examples in rows]
            done = aggregate_device_updates(
                self.model, paths, weights=examples, **self._aggregation
            )
            weights = done.weights
            logs |= {"clients": len(paths), "limited": len(done.limited)}
        else:
            logs["clients"] = privacy.account.sample  # the number that came stays secret
            logs["epsilon"], logs["clip"] = privacy.epsilon(), privacy.clip
            weights = self._private_mean(privacy, paths, before)
        logs["update_norm"] = float(np.linalg.norm(flat(self._exchanged) - before))
        logs |= self._evaluate()
        started = self._one("SELECT started FROM rounds WHERE number = ?", number)
        logs["seconds"] = time.time() - started
        write_weights(self._weights_path(number + 1), weights)
        with self._database:  # from here on, the round is over
            self._database.execute(
                "UPDATE rounds SET logs = ? WHERE number = ?", (json.dumps(logs), number)
            )
            self._start_round(number + 1)
        self.logs.append(logs)
        self._versions.clear()
        self._save_model()
        self._remove_files()

    def _save_model(self) -> None:
        """Writes the model, only after the round is over: nobody sees a result that may change."""
        partial = self.folder / "partial.keras"
        self.model.save(partial)
        partial.replace(self.folder / "model.keras")

    def _private_mean(
        self, privacy: Mechanism, paths: Sequence[Path], before: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Adds noise to the sum of the clipped updates, divided by the expected number of clients.

        With the same steps as `FederatedAveraging` with `privacy`.
        """
        total = np.zeros_like(before)
        within = 0
        for path in paths:
            read = read_update(self.model, path, self._versions)
            change = flat({name: read[name] for name in self._exchanged}) - before
            norm = np.linalg.norm(change)
            total += change * min(1.0, privacy.clip / max(float(norm), 1e-300))
            within += bool(norm <= privacy.clip)
        noise = privacy.noise([v.shape for v in self._exchanged.values()])
        total += np.concatenate([part.ravel() for part in noise])
        privacy.adapt(within, len(paths))
        return assign(self.model, self._exchanged, before + total / privacy.account.sample)

    def _forget_lost_updates(self) -> None:
        """Removes the updates whose files did not survive a power loss."""
        number = self.number
        rows = self._database.execute("SELECT client FROM updates WHERE round = ?", (number,))
        lost = [client for (client,) in rows if not self._update_path(number, client).exists()]
        with self._database:
            for client in lost:
                self._database.execute(
                    "DELETE FROM updates WHERE round = ? AND client = ?", (number, client)
                )

    def _remove_files(self) -> None:
        """Removes the files of earlier rounds; phones may still load the last one's weights."""
        number = self.number
        for path in self._updates.iterdir():
            if not path.name.startswith(f"{number}-"):
                path.unlink(missing_ok=True)
        for path in self.folder.glob("round_*.npz"):
            if int(path.stem.split("_")[1]) < number - 1:
                path.unlink(missing_ok=True)

    def _update_path(self, number: int, client: int) -> Path:
        return self._updates / f"{number}-{client}.npz"

    def _weights_path(self, number: int) -> Path:
        return self.folder / f"round_{number}.npz"

    def _about(self, name: str) -> Any:
        found = self._one("SELECT value FROM about WHERE name = ?", name)
        return None if found is None else json.loads(found)

    def _tell(self, name: str, value: Any) -> None:
        self._database.execute("INSERT INTO about VALUES (?, ?)", (name, json.dumps(value)))

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            row = self._database.execute(query, values).fetchone()
        return None if row is None else row[0]


def _open(path: Path) -> sqlite3.Connection:
    """Opens a database that no other process can open at the same time."""
    database = sqlite3.connect(path, check_same_thread=False, timeout=1)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(_TABLES)
        database.execute("BEGIN EXCLUSIVE")  # from now on, the lock is kept
        database.commit()
    except sqlite3.OperationalError as error:
        database.close()
        raise ValueError(
            f"`folder` must belong to one server. Received: {path.parent}, which cannot be used "
            f"({error}). End the other server or choose another folder."
        ) from error
    return database


def has_begun(folder: Path) -> bool:
    """Returns whether a folder has the rounds of a server."""
    path = folder / "state.sqlite3"
    if not path.exists():
        return False
    database = sqlite3.connect(path, timeout=1)
    try:
        query = "SELECT 1 FROM about WHERE name = 'settings'"
        return database.execute(query).fetchone() is not None
    except sqlite3.OperationalError as error:
        return "locked" in str(error)  # by a running server
    finally:
        database.close()


def hashed(token: str) -> str:
    """Returns what is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()
