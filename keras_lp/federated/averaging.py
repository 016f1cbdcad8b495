"""Federated averaging: TFF trains a compiled Keras model over clients' data.

McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data
(arXiv:1602.05629).
"""

from __future__ import annotations

import collections
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp import checks
from keras_lp.assemble import make_optimizer
from keras_lp.balancing import balancing_of
from keras_lp.federated import tff_model, tff_runtime
from keras_lp.federated.clients import Clients, client_arrays
from keras_lp.heads import tasks
from keras_lp.model import Model


class FederatedAveraging:
    """Trains a compiled model over clients whose data stay with them.

    In a round, some clients get the trainable weights, train with the model's own loss and
    optimizer on their own data, and send the difference; the server averages the differences,
    weighted by the number of examples. TensorFlow Federated runs the rounds; the clients are
    simulated on this machine. Weights that do not train never travel: a client has them already.

    Args:
        model: a compiled Keras model, such as any builder of keras_lp returns. It is trained in
            place.
        clients_per_round: how many clients each round samples, without replacement. Defaults to
            None: all of them.
        local_epochs: passes over a client's own data in a round. Defaults to 1.
        batch_size: examples in a local step; None takes all of a client's at once. Defaults to
            20.
        server_optimizer: a Keras optimizer, or the name of one (`"sgd"` with rate 1, others with
            1e-3), that applies the mean update as its gradient. Defaults to None: the mean update
            itself, SGD of rate 1.
        seed: seed of the sampling, the local shuffles and Dropout, 0 or more. Defaults to 0.

    Raises:
        ValueError: a model that is not compiled; BatchNormalization that trains (its statistics
            are not averaged); an optimizer that a client cannot keep (Nadam, EMA, gradient
            accumulation, loss scaling); a `train_step` of the model's own; numbers below 1.
        TypeError: anything else than a Keras model.
        ImportError: from `fit`, where TensorFlow Federated is not installed; the message says
            how to install it.

    The client's optimizer starts afresh in every client and round: its state, such as momentum,
    and a schedule of its rate. Callbacks that set the rate act from the next round on.

    Example:

    ```python
    model = lp.transfer_model(backbone, 10, optimizer="sgd", learning_rate=0.1)
    federated = lp.FederatedAveraging(model, clients_per_round=10)
    history = federated.fit(lp.partition((x, y), clients=100), rounds=20)
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        clients_per_round: int | None = None,
        local_epochs: int = 1,
        batch_size: int | None = 20,
        server_optimizer: str | keras.optimizers.Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        if clients_per_round is not None:
            checks.check_positive("clients_per_round", clients_per_round, integer=True)
        checks.check_positive("local_epochs", local_epochs, integer=True)
        if batch_size is not None:
            checks.check_positive("batch_size", batch_size, integer=True)
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"`seed` must be an integer of 0 or more. Received: seed={seed!r}.")
        _check_model(model)
        self.model = model
        self.clients_per_round = clients_per_round
        self.local_epochs = local_epochs
        self.batch_size = None if batch_size is None else int(batch_size)
        self.server_optimizer = _server_optimizer(server_optimizer)
        self.seed = seed
        self.rounds_done = 0
        self._process: Any = None
        self._process_key: Any = None
        self._state: Any = None
        # Weights that do not train, as files: clients have them, they travel in no round.
        self._frozen_dir = Path(tempfile.mkdtemp(prefix="keras_lp_"))
        weakref.finalize(self, shutil.rmtree, self._frozen_dir, ignore_errors=True)

    def fit(
        self,
        clients: Clients,
        rounds: int,
        *,
        validation_data: Any = None,
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
        verbose: str | int = "auto",
    ) -> keras.callbacks.History:
        """Runs rounds of federated averaging; afterwards the model holds the global weights.

        A second call goes on: with the model's weights as they are then, the server optimizer's
        state and the number of the round.

        Args:
            clients: a mapping from a client's id to its `(x, y)` arrays, or to an unbatched
                `tf.data.Dataset` of such pairs.
            rounds: how many rounds to run.
            validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched
                `tf.data.Dataset`, evaluated centrally after each round. Defaults to None.
            callbacks: a Keras callback or a list of them; an epoch is a round. Defaults to None.
            verbose: 0 is silent, `"auto"` and 1 print a line a round. Defaults to `"auto"`.

        Returns:
            A `keras.callbacks.History` with an epoch a round: `loss` and the metrics over the
            examples that the clients trained on (as they trained), `val_*`, `clients`,
            `bytes_up` and `bytes_down` (the sizes of the weights sent, over all clients).

        Raises:
            ValueError: no client, more clients a round than there are, a client without
                examples or with bad ones, a model changed since `compile`.
            TypeError: clients that are not a mapping, or data that are not pairs.
            ImportError: TensorFlow Federated is not installed.
        """
        checks.check_positive("rounds", rounds, integer=True)
        checks.check_trainable_unchanged(self.model)
        _check_model(self.model)
        data = self._check_clients(clients)
        validate = _validation(self.model, validation_data)
        self._prepare(tff_runtime.load_tff(), data)

        first = self.rounds_done
        history = keras.callbacks.CallbackList(
            [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else callbacks,
            add_history=True,
            add_progbar=False,
            model=self.model,
            epochs=first + rounds,
            steps=1,
            verbose=0,
        )
        self.model.stop_training = False
        history.on_train_begin()
        logs: dict[str, Any] = {}
        for number in range(first, first + rounds):
            start = time.perf_counter()
            history.on_epoch_begin(number)
            logs = self._round(data)
            logs.update(validate())
            if verbose:
                _print_round(number + 1, first + rounds, time.perf_counter() - start, logs)
            history.on_epoch_end(number, logs)
            if self.model.stop_training:
                break
        history.on_train_end(logs)
        return self.model.history

    def _check_clients(self, clients: Clients) -> dict[str, tuple[Any, Any]]:
        if not isinstance(clients, Mapping):
            raise TypeError(
                "`clients` must map a client's id to its data. Received: clients of type "
                f"{type(clients).__name__}. Make it with lp.partition((x, y), clients=10)."
            )
        if not clients:
            raise ValueError("`clients` must have at least one client. Received: clients={}.")
        if self.clients_per_round is not None and self.clients_per_round > len(clients):
            raise ValueError(
                "`clients_per_round` must be at most the number of clients. Received: "
                f"clients_per_round={self.clients_per_round} for {len(clients)} clients."
            )
        data = {name: client_arrays(self.model, name, part) for name, part in clients.items()}
        specs = {name: tff_model.element_spec(*part) for name, part in data.items()}
        name, spec = next(iter(specs.items()))
        for other, its_spec in specs.items():
            if its_spec != spec:
                raise ValueError(
                    "All clients' data must have one structure, shape and dtype. Received: "
                    f"client {name!r} with {dict(spec)}, client {other!r} with {dict(its_spec)}."
                )
        return data

    def _prepare(self, tff: Any, data: Mapping[str, tuple[Any, Any]]) -> None:
        """Builds the learning process where the model or the data's form are new."""
        x, y = next(iter(data.values()))
        # Builds the metrics; evaluating one example changes nothing else.
        self.model.test_on_batch(*tf.nest.map_structure(lambda array: array[:1], (x, y)))
        self.model.reset_metrics()
        tff_model.write_frozen(self.model, self._frozen_dir)
        spec = tff_model.element_spec(x, y)
        trainable = [id(variable) for variable in self.model.trainable_variables]
        compiled = self.model._compile_config  # a new object with each `compile`
        key = (repr(spec), trainable, compiled, self.local_epochs, self.batch_size)
        if key == self._process_key:
            return
        self._process = tff_model.build_process(
            tff,
            self.model,
            spec,
            frozen_dir=self._frozen_dir,
            local_epochs=self.local_epochs,
            batch_size=self.batch_size,
            server_optimizer=self.server_optimizer,
        )
        state = self._process.initialize()
        if self._process_key is not None and trainable == self._process_key[1]:
            state = state._replace(finalizer=self._state.finalizer)  # the server optimizer's
        self._process_key, self._state = key, state

    def _round(self, data: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        if self.model._compile_config is not self._process_key[2]:
            raise ValueError(
                "A model must stay as it is compiled while `fit` runs. Received: model "
                f"{self.model.name!r}, recompiled since round {self.rounds_done}, perhaps by a "
                "callback. Recompile between two calls of `fit`."
            )
        rng = np.random.default_rng((self.seed, self.rounds_done))
        count = self.clients_per_round or len(data)
        sampled = [list(data)[i] for i in np.sort(rng.choice(len(data), count, replace=False))]
        seeds = rng.integers(2**31 - 1, size=(count, 2), dtype=np.int32)
        rate = np.float32(self.model.optimizer.learning_rate)
        datasets = [
            tf.data.Dataset.from_tensors(
                collections.OrderedDict(
                    x=data[name][0], y=data[name][1], seed=seed, learning_rate=rate
                )
            )
            for name, seed in zip(sampled, seeds, strict=True)
        ]
        weights = tuple(variable.numpy() for variable in self.model.trainable_variables)
        before = self._process.get_model_weights(self._state)._replace(trainable=weights)
        output = self._process.next(self._process.set_model_weights(self._state, before), datasets)
        self._state = output.state
        self.rounds_done += 1
        after = self._process.get_model_weights(self._state).trainable
        for variable, value in zip(self.model.trainable_variables, after, strict=True):
            variable.assign(value)
        sent = count * sum(array.nbytes for array in weights)
        logs = tff_model.metric_results(self.model, output.metrics["client_work"])
        return {**logs, "clients": count, "bytes_up": sent, "bytes_down": sent}


def _validation(model: keras.Model, data: Any) -> Any:
    """Checks the validation data and returns what evaluates the model on them."""
    if data is None:
        return dict
    if isinstance(data, tf.data.Dataset):
        arguments = {"x": checks.checked_dataset(tasks(model), data)}
    else:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_examples(tasks(model), x, y, " of validation_data")
        arguments = {"x": x, "y": y, "sample_weight": sample_weight}

    def validate() -> dict[str, float]:
        results = model.evaluate(**arguments, verbose=0, return_dict=True)
        return {f"val_{name}": value for name, value in results.items()}

    return validate


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"FederatedAveraging takes a compiled Keras model. Received: model={model!r}."
        )
    if not model.compiled or getattr(model, "loss", None) is None or not model.built:
        raise ValueError(
            "FederatedAveraging takes a built model that is compiled with a loss. Received: model "
            f"{model.name!r}, which is not. Use a builder such as lp.transfer_model, or call "
            "model.compile(optimizer, loss)."
        )
    if not getattr(model, "inputs", None) or any(t.shape[0] is not None for t in model.inputs):
        raise ValueError(
            "FederatedAveraging takes a Functional or Sequential model with a free batch size. "
            f"Received: model {model.name!r} of type {type(model).__name__}"
            f"{' with a fixed one' if getattr(model, 'inputs', None) else ''}."
        )
    if balancing_of(model) is not None:
        raise ValueError(
            "Clients add up the losses of their tasks, by fixed weights at most. Received: model "
            f"{model.name!r} with balancing by {type(balancing_of(model)).__name__}. Build it with "
            'balancing="equal" or a dict of weights.'
        )
    if type(model).train_step not in (keras.Model.train_step, Model.train_step):
        raise ValueError(
            "Clients train as Keras does by itself. Received: model "
            f"{model.name!r} of type {type(model).__name__} with a `train_step` of its own, which "
            "they would leave aside."
        )
    if not model.trainable_variables:
        raise ValueError(
            "FederatedAveraging averages trainable weights. Received: model "
            f"{model.name!r} without any."
        )
    training = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if training:
        raise ValueError(
            "Clients cannot train BatchNormalization: its statistics would never be averaged. "
            f"Received: model {model.name!r} with the trainable layers {training[:5]}. Freeze "
            "them (a pretrained backbone's stay frozen in every builder), or build the model "
            "with GroupNormalization."
        )
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Clients train in float32 or bfloat16. Received: a model compiled under "
            "mixed_float16. Build it under keras.config.set_dtype_policy('float32')."
        )
    if isinstance(optimizer, keras.optimizers.Nadam):
        raise ValueError(
            "Clients cannot run Nadam, which keeps state outside its variables. Received: a model "
            f"compiled with {type(optimizer).__name__}. Use Adam or AdamW."
        )
    if optimizer.use_ema or optimizer.gradient_accumulation_steps:
        raise ValueError(
            "The client's optimizer starts afresh every round, so it can neither average weights "
            "nor accumulate gradients. Received: an optimizer with "
            f"use_ema={optimizer.use_ema}, "
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}. Compile the "
            "model without them."
        )


def _server_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    if optimizer is None:
        return keras.optimizers.SGD(1.0)
    return make_optimizer(optimizer, 1.0 if optimizer == "sgd" else 1e-3)


def _print_round(number: int, rounds: int, seconds: float, logs: Mapping[str, Any]) -> None:
    shown = [
        f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in logs.items()
    ]
    print(f"Round {number}/{rounds} - {seconds:.1f}s - {' - '.join(shown)}")
