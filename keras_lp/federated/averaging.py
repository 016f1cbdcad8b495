"""Federated averaging: TFF trains a compiled Keras model over clients' data.

McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data
(arXiv:1602.05629).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np

from keras_lp.federated import tff_runtime
from keras_lp.federated.checkpoints import Checkpoints, describe_model, describe_optimizer, digest
from keras_lp.federated.clients.clients import Clients
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine.client_work import LocalTraining
from keras_lp.federated.engine.model_checks import check_model
from keras_lp.federated.engine.optimizers import server_optimizer as make_server_optimizer
from keras_lp.federated.engine.rounds import Rounds
from keras_lp.federated.evaluation import summary
from keras_lp.federated.head import fit_head
from keras_lp.federated.running import print_restarts, print_round, validation
from keras_lp.model import checks
from keras_lp.model.absent import with_unknown_hidden
from keras_lp.tasks.heads import tasks
from keras_lp.utils.arguments import Verbose, check_choice, check_positive
from keras_lp.utils.progress import bar_only

Weighting = Literal["examples", "uniform"]
Callbacks = keras.callbacks.Callback | Sequence[keras.callbacks.Callback]


class FederatedAveraging:
    """Trains a compiled model over clients whose data stay with them.

    In a round, some clients get the trainable weights, train with the model's own loss and
    optimizer on their own data, and send the difference; the server averages the differences and
    applies them. TensorFlow Federated runs the rounds; the clients are simulated on this machine.
    Weights that do not train never travel: a client has them already. The model is trained in
    place. TFF's process on this machine reads the data of the clients in a round, and the weights
    that do not train, from a temporary folder, which is removed with this object.

    | algorithm | arguments | reference |
    |---|---|---|
    | FedAvg | none | McMahan et al., 2017 (arXiv:1602.05629) |
    | FedSGD | `batch_size=None` | the same |
    | FedProx | `proximal_strength=0.1` | Li et al., 2020 (arXiv:1812.06127) |
    | FedAvgM | `server_optimizer=keras.optimizers.SGD(1.0, momentum=0.9)` | Hsu et al., 2019 \
(arXiv:1909.06335) |
    | FedAdam, FedYogi, FedAdagrad | `server_optimizer="adam"`, `"yogi"`, `"adagrad"` | Reddi et \
al., 2021 (arXiv:2003.00295) |

    With 40 or 1,000 examples over all clients and a frozen backbone call `fit_head`, which needs
    no optimizer; with 50,000 `fit`, by SGD on the clients: an adaptive optimizer restarts in each
    client and round.

    Args:
        model: a compiled Keras model, such as any builder of keras_lp returns. Its optimizer is
            the clients': SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax or Lion.
        clients_per_round: how many clients each round samples, without replacement. Defaults to
            None: all of them.
        local_epochs: passes over a client's own data in a round. Defaults to 1.
        batch_size: examples in a local step; None takes all of a client's at once. Defaults to
            20.
        server_optimizer: what applies the mean update, as its gradient: a Keras optimizer, or a
            name: `"sgd"` (rate 1), `"adam"` and `"yogi"` (rate 1e-2, beta_2 0.99, epsilon 1e-3),
            `"adagrad"` (rate 1e-2, accumulator from 1e-6), or another of Keras's (rate 1e-3).
            Adam and Adagrad are Keras's own, with its bias correction. Defaults to None: SGD of
            rate 1, which adds the mean update.
        proximal_strength: the factor mu of the term `mu / 2 * |w - w_sent|**2` in each client's
            loss, which keeps it near the weights it was sent; it is not part of the `loss` that
            is reported. Defaults to 0.
        weighting: `"examples"`, the clients weigh what they have examples; or `"uniform"`, all
            the same. With several tasks a head weighs by the client's labels of its task, so a
            client without any leaves it alone. Defaults to `"examples"`.
        seed: seed of the sampling, the local shuffles and Dropout, 0 or more. Defaults to 0.

    Raises:
        ValueError: a model that is not compiled; BatchNormalization that trains (its statistics
            are not averaged); an optimizer that a client cannot keep (Nadam, EMA, gradient
            accumulation, loss scaling); a `train_step` of the model's own; numbers out of range.
        TypeError: anything else than a Keras model.
        ImportError: from `fit`, where TensorFlow Federated is not installed; the message says
            how to install it.

    The client's optimizer starts again in every client and round: its state, such as momentum,
    and a schedule of its rate. So adaptive ones such as Adam, the builders' default, often learn
    slowly. Build with `optimizer="sgd"`, whose default rate fits heads on a frozen backbone;
    where more trains, `learning_rate=0.1` is a better start. Callbacks that set the rate act from
    the next round on.

    Heads on a frozen backbone see its features with mean 0 and deviation 1, as in the `fit` of the
    model. If it has not been trained before, the clients of the first round send for this the
    number of their examples, the sum of their features and that of the squares, which are neither
    encrypted nor noised: a client with one example reveals its features. With
    `cache_features=False` the model takes its features as they are, and nothing is sent.

    Example:

    ```python
    model = lp.transfer_model(backbone, 10, optimizer="sgd")
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
        proximal_strength: float = 0.0,
        weighting: Weighting = "examples",
        seed: int = 0,
    ) -> None:
        if clients_per_round is not None:
            check_positive("clients_per_round", clients_per_round, integer=True)
        check_positive("local_epochs", local_epochs, integer=True)
        if batch_size is not None:
            check_positive("batch_size", batch_size, integer=True)
        if proximal_strength != 0:
            check_positive("proximal_strength", proximal_strength)
        check_choice("weighting", weighting, get_args(Weighting))
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"`seed` must be an integer of 0 or more. Received: seed={seed!r}.")
        check_model(model)
        self.model = model
        self.clients_per_round = clients_per_round
        self.seed = int(seed)
        self.rounds_done = 0
        local = LocalTraining(
            int(local_epochs),
            None if batch_size is None else int(batch_size),
            float(proximal_strength),
        )
        server = make_server_optimizer(server_optimizer)
        self._rounds = Rounds(model, local, server, weighting)
        self._settings = {
            "clients_per_round": clients_per_round and int(clients_per_round),
            "local_epochs": local.epochs,
            "batch_size": local.batch_size,
            "proximal_strength": local.proximal_strength,
            "server_optimizer": describe_optimizer(server),
            "weighting": weighting,
            "seed": self.seed,
            "learning_rate": float(model.optimizer.learning_rate),
        }
        self._ends: list[list[Any]] = []  # [last round, stopped by a callback] of calls of `fit`
        self._calls = 0
        self._unknown: set[str] = set()  # the names of this round's logs that are so
        self._logs: list[dict[str, Any]] = []  # of all rounds

    @checks.plain_errors()
    def fit(
        self,
        clients: Clients,
        rounds: int,
        *,
        validation_data: Any = None,
        validation_freq: int | Sequence[int] = 1,
        callbacks: Callbacks | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_freq: int = 1,
        verbose: Verbose = "auto",
    ) -> keras.callbacks.History:
        """Runs rounds of federated averaging; afterwards the model holds the global weights.

        A second call goes on: with the model's weights as they are then, the server optimizer's
        state and the number of the round.

        With `checkpoint_dir` the same program, started again after it was killed, goes on after
        the last round that was saved and ends with the same weights, sampling included. What
        callbacks remember (the patience of EarlyStopping) is not saved, nor are optimizer and
        weights of before a call that finished.

        Args:
            clients: a mapping from a client's id to its `(x, y)` or `(x, y, sample_weight)`
                arrays, or to an unbatched `tf.data.Dataset` of such tuples; TFF's `ClientData` of
                pairs; or `(ids, load)`, a sequence of ids and a function that returns the data of
                one. Arrays in a dict are checked before the first round; all else is loaded and
                checked whenever a client is sampled, and not kept. Sequences may differ in length
                between clients where the input's size is open and the model masks what is added
                (`Embedding(mask_zero=True)`, `Masking`, an input `"padding_mask"`).
            rounds: how many rounds to run.
            validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched
                `tf.data.Dataset`, evaluated centrally. Defaults to None.
            validation_freq: evaluates every so many rounds, or after the rounds of a list that
                counts from 1. Defaults to 1.
            callbacks: a Keras callback or a list of them; an epoch is a round. Defaults to None.
            checkpoint_dir: a folder for the state of the federation; the newest whole
                checkpoint in it is taken up. Defaults to None.
            checkpoint_freq: saves every so many rounds, and after the last. Defaults to 1.
            verbose: 0 is silent; `"auto"` and 1 print a line per round, and show a progress bar of
                the running round in a terminal or notebook; 2 prints the lines only. The line has
                at most 100 columns; the `History` has all figures. Defaults to `"auto"`.

        Returns:
            A `keras.callbacks.History` with an epoch per round: `loss` and the metrics over the
            examples that the clients trained on (as they trained), `val_*`, `clients` (sampled),
            `dropped` (those of them whose update was not finite, or beyond 1e19: it counts
            nothing), `update_norm` (the L2 norm of the mean update), `bytes_up` and `bytes_down`
            (the sizes of the weights sent, over all clients; in the first round also those of the
            sums and of the scale of the features) and `seconds`, validation left out. Where no
            label of a task took part, its loss and metrics are NaN, and callbacks do not get
            them.

        Raises:
            ValueError: no client, more clients a round than there are, a client without
                examples or with bad ones, a model changed since `compile`, a checkpoint of
                another model or other settings.
            TypeError: clients or data of another kind.
            RuntimeError: TFF's worker process died again and again in one round.
            ImportError: TensorFlow Federated is not installed.
        """
        check_positive("rounds", rounds, integer=True)
        check_positive("checkpoint_freq", checkpoint_freq, integer=True)
        checks.check_trainable_unchanged(self.model)
        check_model(self.model)
        validate = validation(self.model, validation_data, validation_freq)
        with Source(self.model, clients) as source:
            self._check_sample(source)
            tff_runtime.load_tff()
            checkpoints = self._resume(checkpoint_dir, source)
            first = self._ends[self._calls - 1][0] if self._calls else 0
            last = first + rounds
            if self._calls < len(self._ends):  # finished before the program was started again
                end, stopped = self._ends[self._calls]
                if stopped or self._calls + 1 < len(self._ends):
                    last = end
            history = self._begin(callbacks, first, last)
            if verbose and self.rounds_done == 0:
                print_restarts(self.model)
            bar = bar_only(verbose)  # the lines of the rounds are below
            compiled = self.model._compile_config  # a new object with each `compile`
            try:
                while self.rounds_done < last and not self.model.stop_training:
                    self._check_compiled(compiled)
                    history.on_epoch_begin(self.rounds_done)
                    sample, label = self._sample(source), f"Round {self.rounds_done + 1}/{last}"
                    with self._rounds.progress(label, source, sample, bar) as progress:
                        logs = self._rounds.run(source, sample, self._random(), progress)
                    self.rounds_done += 1
                    self._warn_of_dropped(logs)
                    validated, unknown = validate(self.rounds_done)
                    logs.update(validated)
                    self._unknown.clear()
                    self._unknown |= self._rounds.unknown | unknown
                    if verbose:
                        print_round(self.rounds_done, last, logs, tasks(self.model))
                    self._logs.append(dict(logs))
                    history.on_epoch_end(self.rounds_done - 1, logs)
                    self._save(checkpoints, checkpoint_freq, last)
            finally:
                self._end_call(last)
            history.on_train_end(self._logs[-1] if self._logs else {})
        return self.model.history

    def fit_head(
        self,
        clients: Clients,
        *,
        l2: float = 1e-3,
        tolerance: float = 1e-6,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        validation_data: Any = None,
        verbose: Verbose = "auto",
    ) -> keras.callbacks.History:
        """Finds the best heads on a frozen backbone, whatever the spread of examples over clients.

        A linear head on frozen features is a convex problem with one solution: the minimum of

            J(W, b) = sum_i w_i * loss(y_i, W^T z_i + b) / sum_i w_i + l2 / 2 * |W|^2

        over the examples of all clients, where `z` are the features with mean 0 and standard
        deviation 1, `loss` is the task's and `w` the sample weights (times those of classes, 0
        where the label is missing; for `MultiLabel` and `Regression` the sum is over entries).
        The result is that of the same problem solved on all examples in one place; one label per
        client changes nothing. All clients take part in every round: `clients_per_round`, the
        optimizers and the other arguments of `FederatedAveraging` play no role.

        Clients send sums over their examples only. In the first round: their count, the sum of
        the features and, with 512 features or fewer, the matrix of the sums of their products,
        which makes the later rounds few (with more features, the squares alone); for
        `Regression` also count, sum and squares of the labels. In each round after it: the sums
        of losses and label weights, and the gradient by kernel and bias, at the point where the
        solver (SciPy's L-BFGS-B) on the server stands. These sums are neither encrypted nor
        noised: a client with one example reveals its features. Features are computed once a
        client, with `cache_features=False` too. Several heads are solved each by itself, in the
        same rounds; Dropout before a head plays no role.

        With `checkpoint_dir` the same program, started again after it was killed, goes on where
        it stopped and ends with the same weights. It needs a folder of its own.

        Args:
            clients: as in `fit`; all of them are loaded.
            l2: strength of the penalty on the weights of the standardised features, above 0.
                Defaults to 1e-3.
            tolerance: the search ends when no entry of the gradient is larger, in the solver's
                coordinates, where the loss is about as steep in every direction. Defaults to
                1e-6.
            checkpoint_dir: a folder for what the clients sent, one file a round. Defaults to
                None.
            validation_data: as in `fit`, evaluated once, with the solution. Defaults to None.
            verbose: 0 is silent; `"auto"` and 1 print a line per round, and show a progress bar in
                a terminal or notebook while clients are loaded; 2 prints the lines only. Defaults
                to `"auto"`.

        Returns:
            A `keras.callbacks.History` with an epoch per round: from the second on `loss` (as
            `evaluate` gives it, without the penalty; with several tasks `<name>_loss` too) and
            `gradient`, its largest entry; and `clients`, `bytes_up`, `bytes_down` and `seconds`
            as in `fit`. `val_*` have one value.

        Raises:
            ValueError: heads with hidden layers, a backbone that trains or is random, losses
                that are not the tasks' own; a task without labels; features that are not
                finite; clients and checkpoints as in `fit`; numbers out of range.
            TypeError: clients or data of another kind.
            RuntimeError: TFF's worker process died again and again in one round.
            ImportError: TensorFlow Federated or SciPy is not installed.

        Example:

        ```python
        model = lp.transfer_model(backbone, 10)
        lp.FederatedAveraging(model).fit_head(lp.partition((x, y), clients=100, alpha=0.1))
        ```

        Reference: Fanì et al., 2024, Accelerating Heterogeneous Federated Learning with
        Closed-form Classifiers (Fed3R, arXiv:2402.05098), for ridge regression.
        """
        return fit_head(
            self.model,
            clients,
            l2=l2,
            tolerance=tolerance,
            checkpoint_dir=checkpoint_dir,
            validation_data=validation_data,
            verbose=verbose,
        )

    def evaluate(self, clients: Clients, *, verbose: Verbose = "auto") -> dict[str, float]:
        """Evaluates the model on each client's own data.

        Args:
            clients: as in `fit`; all of them are evaluated.
            verbose: `"auto"` shows a progress bar in a terminal or notebook; 1 does, and prints
                lines elsewhere; 2 prints lines; 0 is silent. Defaults to `"auto"`.

        Returns:
            A dict with, for the loss and each metric that is one number: `<name>` over all
            examples, as `model.evaluate` gives it on the clients' data together;
            `mean_<name>`, the mean over the clients that have such labels, each counting the
            same; and `worst_decile_<name>`, the mean over the worst tenth of these (one at
            least), where Keras knows which direction is worse; and `clients`, the number of all.
            What no client has a label for is NaN.

        Raises:
            ValueError: no client, a client without examples or with bad ones.
            TypeError: clients or data of another kind.
            ImportError: TensorFlow Federated is not installed.

        Reference: the worst tenth after Li et al., 2020, Fair Resource Allocation in Federated
        Learning (arXiv:1905.10497).
        """
        check_model(self.model)
        with Source(self.model, clients) as source:
            tff_runtime.load_tff()
            with self._rounds.progress("Evaluation", source, source.ids, verbose) as progress:
                results = self._rounds.evaluate(source, progress)
        return {**summary(self.model, *results), "clients": len(source.ids)}

    def _check_sample(self, source: Source) -> None:
        if self.clients_per_round is not None and self.clients_per_round > len(source.ids):
            raise ValueError(
                "`clients_per_round` must be at most the number of clients. Received: "
                f"clients_per_round={self.clients_per_round} for {len(source.ids)} clients."
            )

    def _check_compiled(self, compiled: Any) -> None:
        if self.model._compile_config is not compiled:
            raise ValueError(
                "A model must stay as it is compiled while `fit` runs. Received: model "
                f"{self.model.name!r}, recompiled since round {self.rounds_done}, perhaps by a "
                "callback. Recompile between two calls of `fit`."
            )

    def _sample(self, source: Source) -> list[Any]:
        """Returns the clients of the next round."""
        count = self.clients_per_round or len(source.ids)
        rng = np.random.default_rng((self.seed, self.rounds_done))
        return [source.ids[i] for i in np.sort(rng.choice(len(source.ids), count, replace=False))]

    def _random(self) -> np.random.Generator:
        """Returns what the clients of the next round draw from."""
        return np.random.default_rng((self.seed, self.rounds_done, 1))

    def _begin(self, callbacks: Callbacks | None, first: int, last: int) -> Any:
        """Starts the callbacks; the history of rounds before a restart is there already."""
        given = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else callbacks or []
        callback_list = keras.callbacks.CallbackList(
            with_unknown_hidden(given, self._unknown),
            add_history=True,
            add_progbar=False,
            model=self.model,
            epochs=last,
            steps=1,
            verbose=0,
        )
        self.model.stop_training = False
        callback_list.on_train_begin()
        for number, logs in enumerate(self._logs[first : min(self.rounds_done, last)], first):
            self.model.history.on_epoch_end(number, logs)
        return callback_list

    def _end_call(self, last: int) -> None:
        if self._calls == len(self._ends):
            self._ends.append([self.rounds_done, False])
        elif self._calls + 1 == len(self._ends):  # it may ask for more rounds than before
            self._ends[-1][0] = max(self._ends[-1][0], min(self.rounds_done, last))
        self._calls += 1

    def _warn_of_dropped(self, logs: dict[str, Any]) -> None:
        names = self._rounds.dropped
        if names:
            warnings.warn(
                f"Round {self.rounds_done}: the updates of {len(names)} of {logs['clients']} "
                f"clients were not finite and count nothing: {names[:10]}"
                f"{' and more' if len(names) > 10 else ''}. A smaller learning rate may help.",
                stacklevel=3,
            )

    def _resume(
        self, directory: str | os.PathLike[str] | None, source: Source
    ) -> Checkpoints | None:
        """Opens the folder of checkpoints, and takes up the newest if it is ahead."""
        if directory is None:
            return None
        settings = {**self._settings, **describe_model(self.model)}
        settings["clients"] = digest([repr(client) for client in source.ids])
        checkpoints = Checkpoints(directory, settings)
        found = checkpoints.load()
        if found is not None and found[0] > self.rounds_done:
            self.rounds_done, arrays, about = found
            self._rounds.restore(arrays)
            self._ends, self._logs = about["ends"], about["logs"]
            if about["learning_rate"] is not None:
                self.model.optimizer.learning_rate = about["learning_rate"]
        return checkpoints

    def _save(self, checkpoints: Checkpoints | None, every: int, last: int) -> None:
        ended = self.rounds_done == last or self.model.stop_training
        if checkpoints is None or not (ended or self.rounds_done % every == 0):
            return
        ends = self._ends[: self._calls]
        if ended:
            ends = [*ends, [self.rounds_done, bool(self.model.stop_training)]]
        optimizer = self.model.optimizer
        schedule = isinstance(
            optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule
        )
        about = {
            "ends": ends,
            "logs": [
                {
                    name: value.tolist() if hasattr(value, "tolist") else value
                    for name, value in logs.items()
                }
                for logs in self._logs
            ],
            "learning_rate": None if schedule else float(optimizer.learning_rate),
        }
        checkpoints.save(self.rounds_done, self._rounds.arrays(), about)
