"""The server of a fleet: `FederatedAveraging` whose clients are Flower's nodes."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.engine.head_problem import Standardization
from keras_lp.federated.engine.merging import Merging
from keras_lp.federated.engine.robust import robust_mean
from keras_lp.federated.engine.rounds import PrivateRound, Rounds, changing
from keras_lp.federated.engine.server_step import ServerStep, mean_update, noised_mean
from keras_lp.federated.fleet.messages import Content, from_record, to_record
from keras_lp.federated.fleet.node import version
from keras_lp.model import class_balance
from keras_lp.model.scaling import set_scale, waiting_heads
from keras_lp.tasks.heads import heads
from keras_lp.utils.progress import Progress
from keras_lp.utils.warn import warn

_ASK = 2.0  # seconds between two looks for nodes
_LOOK = 0.2  # seconds between two looks for answers


class Nodes(contextlib.AbstractContextManager["Nodes", None]):
    """The nodes of a run, asked through Flower's grid.

    Args:
        grid: Flower's grid.
        min_nodes: how many nodes to wait for.
        deadline: seconds after which answers no longer count; None waits for all.

    Attributes:
        ids: the names of the nodes, sorted.
        failures: why nodes did not answer the last question, by name.
    """

    def __init__(self, grid: Any, min_nodes: int, deadline: float | None) -> None:
        self._grid = grid
        self._min_nodes = min_nodes
        self._deadline = deadline
        self._node_ids: dict[Hashable, Any] = {}
        self.failures: dict[Hashable, str] = {}

    @property
    def ids(self) -> list[Hashable]:
        return sorted(self._node_ids, key=lambda name: (str(type(name)), name))

    def __exit__(self, *_: Any) -> None:
        pass

    def open(self, model: keras.Model, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for the nodes and gives them the model; returns the form of their data."""
        about = {"version": version(model), "settings": dict(settings)}
        answers: dict[Hashable, Content] = {}
        while True:
            new = [number for number in self._grid.get_node_ids() if number not in answers]
            self._node_ids = {number: number for number in new}
            answers |= self.ask("hello", new, about, may_be_silent=True)
            if len(answers) >= self._min_nodes:
                break
            time.sleep(_ASK)
        names = {answer["name"]: number for number, (answer, _) in answers.items()}
        if len(names) < len(answers):
            raise RuntimeError(
                "Each node must have a name of its own. Received: "
                f"{sorted(str(a['name']) for a, _ in answers.values())}. Start each SuperNode with "
                "another `partition-id` or `name` in --node-config."
            )
        lacking = [answer["name"] for answer, _ in answers.values() if not answer["known"]]
        self._node_ids = dict(names)
        if lacking:
            self.ask("model", lacking, about, [_content(model)])
        forms = self.ask("form", self.ids, about)
        first = next(iter(forms.values()))[0]
        wrong = [name for name, (form, _) in forms.items() if form["form"] != first["form"]]
        if wrong:
            raise RuntimeError(
                "The data of all nodes must have one structure, shape and dtype. Received: "
                f"{first['form']}, and others on the nodes {wrong[:5]}."
            )
        return first

    def ask(
        self,
        work: str,
        names: Sequence[Hashable],
        values: Mapping[str, Any],
        arrays: Sequence[np.ndarray] = (),
        each: Mapping[Hashable, Mapping[str, Any]] | None = None,
        may_be_silent: bool = False,
        secret: bool = False,
    ) -> dict[Hashable, Content]:
        """Returns the answers of nodes, by name.

        Args:
            work: what is asked.
            names: the names of the nodes.
            values: JSON values for all of them.
            arrays: arrays for all of them.
            each: further JSON values for each of them. Defaults to none.
            may_be_silent: whether no answer at all is possible, and no warning. Defaults to False.
            secret: whether it must not be told which nodes were asked. Defaults to False.

        Raises:
            RuntimeError: no node answered; the message has their errors.
        """
        from flwr.app import Message

        sent = [
            Message(
                to_record({"work": work, **values, **(each or {}).get(name, {})}, arrays),
                dst_node_id=self._node_ids[name],
                message_type="train",
            )
            for name in names
        ]
        answers: dict[Hashable, Content] = {}
        self.failures, silent = {}, dict.fromkeys(names, f"no answer in {self._deadline} seconds")
        for name, reply in self._replies(names, sent):
            if not reply.has_error():
                try:
                    answers[name] = from_record(reply.content)
                except (KeyError, TypeError, ValueError) as error:
                    self.failures[name] = f"its answer cannot be read ({error})"
            elif reply.metadata.src_node_id == self._node_ids[name]:
                self.failures[name] = reply.error.reason
            else:  # the SuperLink answers for a node that is gone
                silent[name] = reply.error.reason
        if may_be_silent and not self.failures:
            return answers
        for name in names:
            if name not in answers:
                self.failures.setdefault(name, silent[name])
        listed = "; ".join(f"{name}: {why}" for name, why in list(self.failures.items())[:10])
        if not answers:
            raise RuntimeError(f"No node answered {work!r}. {'' if secret else listed}")
        if self.failures and not secret:
            warn(f"{len(self.failures)} of {len(names)} nodes are left out of {work!r}: {listed}")
        return {name: answers[name] for name in names if name in answers}

    def _replies(
        self, names: Sequence[Hashable], sent: Sequence[Any]
    ) -> Iterator[tuple[Hashable, Any]]:
        """Yields the names of nodes and their answers to messages until the deadline.

        As `send_and_receive` of the grid, which looks for answers every three seconds only.
        """
        waiting = dict(zip(self._grid.push_messages(sent), names, strict=True))
        end = math.inf if self._deadline is None else time.monotonic() + self._deadline
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id, None)
                if name is not None:
                    yield name, reply
            if not waiting or time.monotonic() > end:
                return
            time.sleep(_LOOK)


class FleetRounds(Rounds):
    """Runs the rounds of a federation on nodes. See `Rounds` for the arguments."""

    def source(self, clients: Nodes) -> Any:
        """Waits for the nodes; returns them."""
        settings = {
            "local": {
                "epochs": self._local.epochs,
                "batch_size": self._local.batch_size,
                "proximal_strength": self._local.proximal_strength,
            },
            "weighting": self._weighting,
        }
        form = clients.open(self._model, settings)
        data = tuple(_zeros(part) for part in form["form"])
        stateless = self._stateless(data, on_features=False)
        self._model.reset_metrics()
        start = [np.asarray(variable) for variable in self._model.metrics_variables]
        stateless.merging = Merging(form["ways"], start)
        self._training.stateless = stateless
        self._step = ServerStep(self._server_optimizer, self.personal_variables().shared)
        self._about = {"version": version(self._model), "settings": settings}
        return clients

    def describe(self, source: Any) -> None:
        """Returns nothing: nodes may come and go between runs."""

    def progress(self, label: str, source: Any, clients: Sequence[Hashable], verbose: Any) -> Any:
        """Returns no progress: Flower shows the messages."""
        return Progress(label, len(clients), 0)

    def run(
        self,
        source: Any,
        clients: Sequence[Hashable],
        rng: np.random.Generator,
        progress: Progress,
        private: PrivateRound | None = None,
        own: Any = None,
        ranks: Any = None,
    ) -> dict[str, Any]:
        """Runs a round and returns its logs, as `Rounds.run`."""
        begun = time.perf_counter()
        seeds = rng.integers(2**31 - 1, size=(len(clients), 2), dtype=np.int32)
        if waiting_heads(self._model) and private is None:
            found = _summed(source.ask("moments", clients, self._about))
            if found["count"] > 0:
                scale = Standardization(found)
                set_scale(waiting_heads(self._model), scale.mean, scale.scale)
        waiting = class_balance.waiting_heads(heads(self._model))
        if waiting:
            found = _summed(source.ask("classes", clients, self._about))
            for name, head in waiting.items():
                class_balance.set_weights(head, found[name])
        personal = self.personal_variables()
        arrays = [variable.numpy() for variable in changing(self._model)]
        answers = source.ask(
            "update",
            clients,
            {
                **self._about,
                "learning_rate": float(self._model.optimizer.learning_rate),
                "clip": math.inf if private is None else private.clip,
                "uniform": private is not None,
            },
            arrays,
            {name: {"seed": seed.tolist()} for name, seed in zip(clients, seeds, strict=True)},
            secret=private is not None,
        )
        shapes = [tuple(variable.shape) for variable in personal.shared]
        groups, limit = len(self._groups()), math.inf if private is None else private.clip
        parts = {name: _checked(one, shapes, groups, limit) for name, one in answers.items()}
        self.dropped = [name for name, part in parts.items() if part is None or part["dropped"]]
        good = {name: part for name, part in parts.items() if part and not part["dropped"]}
        if private is None and not good:
            raise RuntimeError(
                f"At least one update must be finite. Received: {len(answers)} that are not, of "
                f"{list(answers)[:10]}. A smaller learning rate may help."
            )
        norm = self._apply(list(good.values()), private)
        size = sum(array.nbytes for array in arrays)
        logs = {
            "clients": len(clients),
            "update_norm": norm,
            "bytes_up": size * len(answers),
            "bytes_down": size * len(clients),
            "seconds": time.perf_counter() - begun,
        }
        if private is not None:
            self.dropped, self.unknown = [], set()
            within = sum(part["within"] for part in good.values()) if private.counts else 0
            counts = {"clients": private.expected, "bytes_up": size * private.expected}
            return {**logs, **counts, "bytes_down": size * private.expected, "within": within}
        results = self._results([part["metrics"] for part in good.values()], all_dropped=False)
        return {**results, **logs, "dropped": len(self.dropped), "absent": len(source.failures)}

    def _apply(self, parts: Sequence[dict[str, Any]], private: PrivateRound | None) -> float:
        """Changes the weights by the updates; returns the norm of the mean update."""
        shared = self.personal_variables().shared
        zeros = [np.zeros(v.shape, "float32") for v in shared]
        update: Any
        total = [sum(u) for u in zip(zeros, *(part["update"] for part in parts), strict=True)]
        if private is not None:
            kept = total if private.counts else zeros
            update = noised_mean(_tensors(kept), private.noise, np.float32(private.expected))
        elif self._aggregation != "mean":
            stacked = [np.stack(u) for u in zip(*(part["update"] for part in parts), strict=True)]
            present = tf.ones(len(parts), tf.bool)
            update = robust_mean(_tensors(stacked), present, self._aggregation)
        else:
            shares = sum(part["shares"] for part in parts)
            update = mean_update(_tensors(total), tf.constant(shares), self._groups().of_variables)
        trainable = self._trainable()
        if self._slots is None or trainable != self._slots_of:
            self._slots, self._slots_of = tuple(self._step.start), trainable
        weights = [tf.constant(variable.numpy()) for variable in shared]
        slots, new, norm = self._step.apply(self._slots, weights, list(update))
        self._slots = tuple(np.asarray(slot) for slot in slots)
        for variable, value in zip(shared, new, strict=True):
            variable.assign(value)
        return float(norm)


def _tensors(arrays: Sequence[Any]) -> list[tf.Tensor]:
    return [tf.constant(array) for array in arrays]


def _summed(answers: Mapping[Hashable, Content]) -> dict[str, np.ndarray]:
    """Returns the sums of named arrays of nodes, without those that are not finite.

    Raises:
        RuntimeError: no node sent finite numbers, or they differ in form.
    """
    good = [
        dict(zip(values["names"], arrays, strict=True))
        for values, arrays in answers.values()
        if all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays)
    ]
    forms = {tuple((name, array.shape) for name, array in one.items()) for one in good}
    if len(forms) != 1:
        raise RuntimeError(
            "Nodes must send finite sums of the same form. Received: "
            f"{len(good)} of {len(answers)} that are finite, in {len(forms)} forms."
        )
    return {name: np.sum([one[name] for one in good], axis=0) for name in good[0]}


def _checked(
    answer: Content, shapes: Sequence[tuple[int, ...]], groups: int, clip: float
) -> dict[str, Any] | None:
    """Returns the parts of an update; None if it is not finite or has another form.

    Args:
        answer: of a node, which may send anything.
        shapes: the shapes of the weights.
        groups: number of groups of weights.
        clip: the norm to which an update is shortened.
    """
    values, arrays = answer
    try:
        count, states = (int(number) for number in values["counts"])
        dropped, within = int(values["dropped"]), int(values["within"])
        update, rest = [one.astype("float32") for one in arrays[:count]], arrays[count:]
        shares = rest[-1].astype("float32")
        norm = math.sqrt(sum(float(np.square(u, dtype="float64").sum()) for u in update))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    fits = [one.shape for one in update] == list(shapes) and len(rest) == states + 2
    if not fits or shares.shape != (groups,) or dropped not in (0, 1) or within not in (0, 1):
        return None
    if not math.isfinite(norm) or not np.isfinite(shares).all() or (shares < 0).any():
        return None
    if norm > clip:
        update = [one * np.float32(clip / norm) for one in update]
    return {
        "update": update,
        "metrics": {"states": rest[:states], "place": rest[states]},
        "shares": shares,
        "dropped": dropped,
        "within": within,
    }


def _content(model: keras.Model) -> np.ndarray:
    """Returns the bytes of the file of a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return np.frombuffer(path.read_bytes(), "uint8")


def _zeros(form: Any) -> Any:
    """Returns one example of a form."""
    if isinstance(form, dict):
        return {name: _zeros(part) for name, part in form.items()}
    if len(form) == 2 and isinstance(form[1], str):
        return np.zeros((1, *form[0]), form[1])
    return [_zeros(part) for part in form]
