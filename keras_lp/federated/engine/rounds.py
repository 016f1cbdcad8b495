"""Runs rounds with TFF and keeps the state between them."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated import tff_runtime
from keras_lp.federated.checkpoints import digest
from keras_lp.federated.clients.arrays import Arrays
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine import tff_model
from keras_lp.federated.engine.adapters import ALL_RANKS, Adapters
from keras_lp.federated.engine.before_rounds import balance_classes, scale_features
from keras_lp.federated.engine.blocks import Work, block_spec, rows_reader, rows_spec, to_blocks
from keras_lp.federated.engine.client_work import (
    LocalTraining,
    StatelessModel,
    evaluate_block,
    scalars,
    train_block,
)
from keras_lp.federated.engine.compression import Compression
from keras_lp.federated.engine.done import ClientsDone
from keras_lp.federated.engine.groups import Groups
from keras_lp.federated.engine.merging import find_merging
from keras_lp.federated.engine.personal import Personal, PersonalLayers
from keras_lp.federated.engine.workers import on_worker
from keras_lp.model import class_balance
from keras_lp.model.scaling import waiting_heads
from keras_lp.tasks.heads import heads
from keras_lp.utils.arguments import Verbose
from keras_lp.utils.keras_internals import compile_config
from keras_lp.utils.progress import Progress
from keras_lp.utils.robust import Aggregation

_EVALUATED_AT_ONCE = 256  # clients


@dataclasses.dataclass(frozen=True)
class PrivateRound:
    """What a round with differential privacy needs.

    Attributes:
        clip: the norm to which the update of each client is clipped.
        noise: the noise on the sum of the updates, an array for each trainable weight.
        expected: the number of clients by which the sum is divided.
        capacity: the largest number of clients; rounds with the same one share a computation.
        counts: whether the updates count; False if nobody was sampled.
        random: random numbers for the shuffling and Dropout of the clients.
    """

    clip: float
    noise: Sequence[np.ndarray]
    expected: int
    capacity: int
    counts: bool
    random: np.random.Generator


class Rounds:
    """Runs the rounds of a federation.

    Holds the state of the server optimizer. The weights are those of the model.

    Args:
        model: a compiled model.
        local: the settings of local training.
        server_optimizer: the optimizer that applies the mean update.
        weighting: `"examples"` or `"uniform"`.
        compression: how updates are compressed, or None.
        aggregation: how updates are combined.
        personal_layers: the layers that stay on the clients.
        exact: whether the product of adapters is averaged exactly.

    Attributes:
        personal: the personal values of the clients of the last round, `(clients, size)`.
        dropped: the clients whose update was not finite in the last round.
        unknown: the names of logs of the last round without labels, which are NaN.
    """

    def __init__(
        self,
        model: keras.Model,
        local: LocalTraining,
        server_optimizer: keras.optimizers.Optimizer,
        weighting: str,
        compression: Compression | None = None,
        aggregation: Aggregation = "mean",
        personal_layers: PersonalLayers = None,
        exact: bool = False,
    ) -> None:
        self._model = model
        self._personal_layers = personal_layers
        self._exact = exact
        self.personal = np.zeros((0, 0), "float32")
        self._local = local
        self._server_optimizer = server_optimizer
        self._weighting = weighting
        self._compression = compression
        self._aggregation = aggregation
        self._training = _Built()
        self._evaluation = _Built()
        self._slots: tuple[np.ndarray, ...] | None = None  # of the server optimizer
        self._slots_of: list[int] | None = None
        self.dropped: list[Hashable] = []
        self.unknown: set[str] = set()
        # Files of the non-trainable weights and the client data. They are not part of messages,
        # because clients already have them.
        self._folder = Path(tempfile.mkdtemp(prefix="keras_lp_"))
        self._done = ClientsDone(self._folder)
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def source(self, clients: Any) -> Source:
        """Returns the source of the data of clients.

        Args:
            clients: as in `FederatedAveraging.fit`.

        Raises:
            ImportError: TFF is not installed.
        """
        source = Source(self._model, clients)
        tff_runtime.load_tff()
        return source

    def describe(self, source: Source) -> str | None:
        """Returns a digest of the clients, which must stay the same in a folder of checkpoints."""
        return digest([repr(client) for client in source.ids])

    def progress(
        self, label: str, source: Source, clients: Sequence[Hashable], verbose: Verbose
    ) -> Progress:
        """Returns the progress of clients: of those that must be loaded, then of their work."""
        self._done.clear()
        total = source.waiting(clients) + len(clients)
        return Progress(label, total, verbose, self._done.read)

    def run(
        self,
        source: Source,
        clients: Sequence[Hashable],
        rng: np.random.Generator,
        progress: Progress,
        private: PrivateRound | None = None,
        own: Sequence[np.ndarray | None] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Runs a round and returns its logs.

        The metrics of a private round are withheld. `within` of it must not be published without
        noise.

        Args:
            source: the source of the client data.
            clients: the ids of the clients.
            rng: the random generator for their shuffling and Dropout.
            progress: the result of `progress` for these clients.
            private: what a private round needs. Defaults to None: the round is not private.
            own: the personal values of each client, `(size,)`, or None. Defaults to None: those of
                the model.
            ranks: the rank of the adapters of each client. Defaults to None: that of the model.
        """
        start = time.perf_counter()
        seeds = rng.integers(2**31 - 1, size=(len(clients), 2), dtype=np.int32)
        groups = self._groups()
        data = source.load_all(clients, progress)
        up, down = 0, 0
        if waiting_heads(self._model) and private is None:
            up, down = scale_features(self._model, data, source.on_features, self._folder)
        if class_balance.waiting_heads(heads(self._model)):
            sent = balance_classes(self._model, data, self._folder)
            up, down = up + sent[0], down + sent[1]
        fixed = None if private is None else np.full(len(groups), private.counts, "float32")
        personal = self.personal_variables()
        default = personal.values()
        work = [
            Work(
                arrays,
                groups.shares(arrays) if fixed is None else fixed,
                seed,
                default if values is None else values,
                rank,
            )
            for arrays, seed, values, rank in zip(
                data,
                seeds,
                own or [None] * len(data),
                ranks or [ALL_RANKS] * len(data),
                strict=True,
            )
        ]
        count = len(clients) if private is None else private.capacity
        process, state = self._prepare(
            data[0], count, source.on_features, private=private is not None
        )
        weights = tuple(variable.numpy() for variable in personal.shared)
        sent = state.global_model_weights._replace(trainable=weights)
        state = state._replace(global_model_weights=sent, finalizer=self._slots)
        if private is not None:
            noised = tuple(private.noise), np.float32(private.expected)
            state = state._replace(aggregator=noised)
        rate = float(self._model.optimizer.learning_rate)
        blocks = to_blocks(
            work, rate, self._folder, clip=math.inf if private is None else private.clip
        )
        output = tff_runtime.call(lambda: process.next(state, blocks), self._folder, len(blocks))
        self._slots = tuple(output.state.finalizer)
        after = output.state.global_model_weights.trainable
        for variable, value in zip(personal.shared, after, strict=True):
            variable.assign(value)
        measured = output.metrics["client_work"]
        self.personal = np.asarray(measured["personal"])[: len(clients)]
        adapters = Adapters(self._model, personal)
        if self._exact:
            adapters.fold(measured["adapters"])
            down += adapters.bytes_down()
        size = sum(array.nbytes for array in weights)
        if private is not None:
            self.dropped, self.unknown = [], set()
            return {
                "within": int(measured["within"]),
                "clients": private.expected,
                "update_norm": float(output.metrics["finalizer"]),
                "bytes_up": private.expected * size,
                "bytes_down": private.expected * size,
                "seconds": time.perf_counter() - start,
            }
        flags = np.asarray(measured["dropped"])
        self.dropped = [client for client, flag in zip(clients, flags, strict=True) if flag]
        logs = self._results([measured["metrics"]], all_dropped=len(self.dropped) == len(clients))
        return {
            **logs,
            "clients": len(clients),
            "dropped": len(self.dropped),
            "update_norm": float(output.metrics["finalizer"]),
            "bytes_up": len(clients) * up
            + sum(self._sent(adapters.shapes(personal.shared, one.rank)) for one in work),
            "bytes_down": len(clients) * (size + down),
            "seconds": time.perf_counter() - start,
        }

    def _sent(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Returns the bytes of the update that a client sends, of arrays of these shapes."""
        if self._compression is not None:
            return self._compression.size(shapes)
        variables = self.personal_variables().shared
        return sum(
            tf.as_dtype(variable.dtype).size * math.prod(shape)
            for variable, shape in zip(variables, shapes, strict=True)
        )

    def _results(self, parts: Sequence[Any], all_dropped: bool) -> dict[str, Any]:
        """Returns the logs of a round and stores the names of those without labels."""
        stateless = self._training.stateless
        metrics = stateless.merging.whole(parts)
        logs = {name: _plain(value) for name, value in stateless.results(metrics).items()}
        self.unknown = {name for name, label in stateless.seen(metrics).items() if not label}
        if all_dropped:
            return {name: _plain(np.full_like(value, np.nan)) for name, value in logs.items()}
        return logs

    def evaluate(
        self, source: Source, progress: Progress, own: Callable[[Hashable], np.ndarray | None]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Returns the results over all examples, the results per client, and which of them exist.

        The last two are arrays `(clients,)` by name. A client without labels of a task has no
        results for it.

        Args:
            source: the source of the client data.
            progress: the result of `progress` for all clients.
            own: function that returns the personal values of a client, None if it has none.
        """
        personal = self.personal_variables()
        default = personal.values()
        count = min(_EVALUATED_AT_ONCE, len(source.ids))
        groups, tables, seen, parts = self._groups(), [], [], []
        for first in range(0, len(source.ids), count):
            ids = source.ids[first : first + count]
            data = source.load_all(ids, progress)
            computation = self._prepare_evaluation(data[0], count, source.on_features)
            seed = np.zeros(2, "int32")
            kept = [own(client) for client in ids]
            values = [(default if one is None else one)[: personal.known] for one in kept]
            work = [
                Work(arrays, groups.shares(arrays), seed, value)
                for arrays, value in zip(data, values, strict=True)
            ]
            blocks = to_blocks(work, 0.0, self._folder)
            weights = tuple(variable.numpy() for variable in personal.shared)
            call = functools.partial(computation, weights, blocks)
            result = tff_runtime.call(call, self._folder, len(blocks))
            tables.append(np.asarray(result["clients"])[: len(data)])
            seen.append(np.asarray(result["seen"])[: len(data)] > 0)
            parts.append(result["metrics"])
            self._done.clear()
            progress.step(len(data))
        stateless = self._evaluation.stateless
        totals = scalars(stateless.results(stateless.merging.whole(parts)))
        each, exist = (
            dict(zip(totals, np.concatenate(table).T, strict=True)) for table in (tables, seen)
        )
        return {name: _plain(value) for name, value in totals.items()}, each, exist

    def arrays(self) -> list[np.ndarray]:
        """Returns the state after a round: weights that change, then the optimizer state."""
        return [*(variable.numpy() for variable in self._changing()), *(self._slots or ())]

    def restore(self, arrays: Sequence[np.ndarray]) -> None:
        """Restores the state that `arrays` returned."""
        variables = self._changing()
        for variable, value in zip(variables, arrays, strict=False):
            variable.assign(value)
        self._slots = tuple(arrays[len(variables) :])
        self._slots_of = self._trainable()

    def _changing(self) -> list[Any]:
        return [*changing(self._model), *self.folded()]

    def folded(self) -> list[Any]:
        """Returns the frozen kernels that change with the exact averaging of adapters."""
        return Adapters(self._model, self.personal_variables()).kernels if self._exact else []

    def _groups(self) -> Groups:
        if self._training.groups is None or self._training.compiled is not self._compiled():
            self._training.groups = Groups(self._model, self._weighting)
            self._training.compiled = self._compiled()
        return self._training.groups

    def _compiled(self) -> Any:
        return compile_config(self._model)  # a new object with each `compile`

    def _trainable(self) -> list[int]:
        return [id(variable) for variable in self._model.trainable_variables]

    def _prepare(self, data: Arrays, count: int, on_features: bool, private: bool) -> Any:
        """Returns the TFF process and its state, rebuilt if the model or data specs change."""
        built, groups = self._training, self._groups()
        personal = self.personal_variables()
        spec, rows = block_spec(len(groups), personal.size), rows_spec(data)
        trainable = self._trainable()
        momenta = personal.momenta(self._model)
        where = on_worker(self._folder)
        key = (where, repr(rows), trainable, self._compiled(), count, on_features, private, momenta)
        if key != built.key:
            stateless = self._stateless(data, on_features)
            of_variables, _ = personal.split(groups.of_variables)
            built.process = tff_model.build_process(
                tff_runtime.load_tff(),
                personal.shared,
                spec,
                train_block(
                    stateless,
                    self._local,
                    of_variables,
                    count,
                    rows_reader(self._folder, rows),
                    self._done,
                    self._compression,
                    separate=self._aggregation != "mean",
                    exact=self._exact,
                ),
                of_variables,
                self._server_optimizer,
                private,
                self._aggregation,
                count,
            )
            built.state = tff_runtime.call(built.process.initialize)
            built.stateless, built.key = stateless, key
        if self._slots is None or trainable != self._slots_of:
            self._slots, self._slots_of = tuple(built.state.finalizer), trainable
        built.stateless.write_frozen()
        return built.process, built.state

    def _prepare_evaluation(self, data: Arrays, count: int, on_features: bool) -> Any:
        built = self._evaluation
        personal = self.personal_variables()
        spec, rows = block_spec(len(self._groups()), personal.known), rows_spec(data)
        where = on_worker(self._folder)
        key = (where, repr(rows), self._trainable(), self._compiled(), count, on_features)
        if key != built.key:
            stateless = self._stateless(data, on_features)
            built.process = tff_model.build_sum(
                tff_runtime.load_tff(),
                [tf.TensorSpec(v.shape, v.dtype) for v in personal.shared],
                spec,
                evaluate_block(stateless, count, rows_reader(self._folder, rows), self._done),
            )
            built.stateless, built.key = stateless, key
        built.stateless.write_frozen()
        return built.process

    def _stateless(self, data: Arrays, on_features: bool) -> StatelessModel:
        # Evaluates one example to build the metrics. This changes nothing else.
        self._model.test_on_batch(*tf.nest.map_structure(lambda array: array[:1], data))
        self._model.reset_metrics()
        merging = find_merging(self._model, data)
        personal = self.personal_variables()
        return StatelessModel(self._model, self._folder, on_features, merging, personal)

    def personal_variables(self) -> Personal:
        """Returns which variables stay on the clients."""
        feedback = self._compression is not None and self._compression.error_feedback
        return Personal(self._model, self._personal_layers, feedback)


def changing(model: keras.Model) -> list[Any]:
    """Returns the variables that training changes: weights, and the scales that `fit` sets."""
    known = heads(model).values()
    return [
        *model.trainable_variables,
        *(variable for head in known for variable in head.set_by_fit().values()),
    ]


class _Built:
    """Objects that were built for a form of data, and the key of that form."""

    def __init__(self) -> None:
        self.key: Any = None
        self.process: Any = None
        self.state: Any = None
        self.stateless: Any = None
        self.groups: Groups | None = None
        self.compiled: Any = None


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    return array if array.ndim else float(array)
