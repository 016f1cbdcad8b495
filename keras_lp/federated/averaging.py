"""Federated averaging of a compiled Keras model with TensorFlow Federated (TFF).

McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data
(arXiv:1602.05629).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import numpy as np

from keras_lp.backbones.copying import copy_model
from keras_lp.federated import tff_runtime
from keras_lp.federated.checkpoints import Checkpoints, describe_model, describe_optimizer
from keras_lp.federated.clients.clients import Clients
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine.adapters import ALL_RANKS, LoRAAveraging, check_lora
from keras_lp.federated.engine.client_work import LocalTraining
from keras_lp.federated.engine.compression import Compression
from keras_lp.federated.engine.model_checks import check_model
from keras_lp.federated.engine.optimizers import server_optimizer as make_server_optimizer
from keras_lp.federated.engine.personal import PersonalLayers
from keras_lp.federated.engine.rounds import Rounds
from keras_lp.federated.evaluation import summary
from keras_lp.federated.head import fit_head
from keras_lp.federated.personal_clients import PersonalClients
from keras_lp.federated.private import PrivateClients
from keras_lp.federated.running import print_restarts, print_round, validation
from keras_lp.model import checks
from keras_lp.model.absent import with_unknown_hidden
from keras_lp.model.adapters import adapted_layers
from keras_lp.model.plain import plain_model, with_values
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.report import PrivacyReport
from keras_lp.tasks.heads import heads, tasks
from keras_lp.utils.arguments import Verbose, check_choice, check_positive
from keras_lp.utils.keras_internals import compile_config, rate_of
from keras_lp.utils.progress import bar_only
from keras_lp.utils.robust import Aggregation
from keras_lp.utils.warn import warn

Weighting = Literal["examples", "uniform"]
Callbacks = keras.callbacks.Callback | Sequence[keras.callbacks.Callback]


class FederatedAveraging:
    """Trains a compiled model with federated averaging over clients.

    In each round, the server sends the trainable weights to a sample of clients. Each client trains
    on its own data with the loss and optimizer of the model and returns the difference of the
    weights and its metrics. The server averages the differences and applies the mean update.
    TensorFlow Federated (TFF) runs the rounds, and the clients are simulated on this machine. Non-
    trainable weights are not sent, because clients already have them. The model is trained in
    place. The TFF process reads the client data of a round and the non-trainable weights from a
    temporary folder, which is deleted together with this object.

    | algorithm | arguments | reference |
    |---|---|---|
    | FedAvg | none | McMahan et al., 2017 (arXiv:1602.05629) |
    | FedSGD | `batch_size=None` | McMahan et al., 2017 (arXiv:1602.05629) |
    | FedProx | `proximal_strength=0.1` | Li et al., 2020 (arXiv:1812.06127) |
    | FedAvgM | `server_optimizer=keras.optimizers.SGD(1.0, momentum=0.9)` | Hsu et al., 2019 \
(arXiv:1909.06335) |
    | FedAdam, FedYogi, FedAdagrad | `server_optimizer="adam"`, `"yogi"`, `"adagrad"` | Reddi et \
al., 2021 (arXiv:2003.00295) |
    | FedPer | `personal_layers="head"` | Arivazhagan et al., 2019 (arXiv:1912.00818) |
    | FedBN | `personal_layers="normalization"` | Li et al., 2021 (arXiv:2102.07623) |
    | FedEx-LoRA | `lora_averaging="exact"` | Singhal et al., 2024 \
(arXiv:2410.09432) |
    | DP-FedAvg | `privacy=lp.DifferentialPrivacy(epsilon=8, delta=1e-5)` | McMahan et al., 2018 \
(arXiv:1710.06963) |

    With a frozen backbone and few examples over all clients (40 or 1,000), use `fit_head`, which
    needs no optimizer. With many (50,000), use `fit` with SGD on the clients.

    Args:
        model: a compiled Keras model, for example from any builder of keras_lp. Clients train with
            its optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax or Lion.
        clients_per_round: number of clients sampled per round, without replacement; with `privacy`
            the expected number. Defaults to None: all clients.
        local_epochs: number of passes over the data of a client per round. Defaults to 1.
        batch_size: number of examples per local step; None uses all examples of a client in one
            step. Defaults to 20.
        server_optimizer: the optimizer that applies the mean update as its gradient: a Keras
            optimizer, or a name: `"sgd"` (learning rate 1), `"adam"` and `"yogi"` (learning rate
            1e-2, beta_2 0.99, epsilon 1e-3), `"adagrad"` (learning rate 1e-2, initial accumulator
            1e-6), or another Keras optimizer (learning rate 1e-3). Adam and Adagrad are those of
            Keras, with its bias correction. Defaults to None: SGD with learning rate 1, which adds
            the mean update.
        proximal_strength: the factor mu of the term `mu / 2 * |w - w_sent|**2` in the loss of each
            client, which keeps its weights near those it received. The reported `loss` does not
            include it. Defaults to 0.
        weighting: `"examples"` weights clients by their number of examples, `"uniform"` weights
            all clients equally. With several tasks, a head is weighted by the labels of its task,
            so clients without such labels do not affect it. Defaults to None: `"examples"`, and
            `"uniform"` with `privacy` or a robust `aggregation`, which allow nothing else.
        aggregation: how updates are combined. `"mean"` lets one bad client move the model as far as
            it likes. These need the separate updates of all clients of a round in memory, and
            weight clients equally: `"median"` and `"trimmed_mean"` of each weight (without a fifth
            at either end; Yin et al., 2018, arXiv:1803.01498), and `"krum"`, the update nearest to
            the others if a fifth may be bad (Blanchard et al., 2017, arXiv:1703.02757). For models
            with one task. Defaults to `"mean"`.
        compression: `lp.Quantize` or `lp.TopK`, with which clients send smaller updates. Not with
            `privacy`, whose noise is added on the server. Defaults to None.
        personal_layers: the layers that stay on the clients, see below: `"head"` (with its hidden
            layers), `"normalization"`, or a list of layer names. Defaults to None: all trainable
            layers are shared.
        lora_averaging: how the adapters of `lp.LoRA` are averaged. The mean of the products A B is
            not the product of the means: `"separate"` averages A and B, and `"exact"` adds the rest
            to the frozen kernels, which clients then receive in each round. The mean model is then
            that of all clients, with the default server optimizer. Save the whole model afterwards,
            as `lp.save_adapters` leaves the kernels out. Not with `privacy`, a robust `aggregation`
            or adapters in personal layers. Defaults to `"separate"`, from which the exact mean was
            not told apart in benchmarks.
        lora_ranks: ranks of the clients with smaller adapters, by id: they train the first entries
            of A and B along the rank. Not with `compression`. Defaults to None: all train the rank
            of the model.
        privacy: `lp.DifferentialPrivacy` for the clients, see below. Defaults to None.
        seed: random seed of the sampling, the local shuffling and Dropout, 0 or more. Defaults to
            0.

    Raises:
        ValueError: the model is not compiled, has trainable BatchNormalization that is shared (its
            statistics are not averaged) or a custom `train_step`, its optimizer cannot run on
            clients (Nadam, EMA, gradient accumulation, loss scaling), or a number is out of range.
        TypeError: `model` is not a Keras model.
        ImportError: raised by `fit` if TensorFlow Federated, or dp-accounting for `privacy`, is not
            installed. The message explains how to install it.

    The client optimizer restarts on every client in every round, including its state (such as
    momentum) and its learning rate schedule. Adaptive optimizers such as Adam, the default of the
    builders, therefore often learn slowly. Build the model with `optimizer="sgd"`. Its default
    learning rate suits heads on a frozen backbone; if more layers train, start with
    `learning_rate=0.1`. A learning rate that a callback sets takes effect in the next round.

    As in `fit` of the model, the heads on a frozen backbone use features with mean 0 and standard
    deviation 1. If the model has not been trained before, the clients of the first round send the
    statistics for this: their number of examples, the sum of their features and the sum of the
    squares. They are neither encrypted nor noised, so a client with one example reveals its
    features. With `cache_features=False` features are not scaled, and nothing is sent.

    Each client has its own weights of `personal_layers`, which are not sent. They begin with the
    values in `model`, which do not change, and are kept between rounds in files: in the folder
    `clients` of `checkpoint_dir`, else in a temporary folder. `evaluate` uses them, and
    `client_model` returns the model of a client. The statistics of personal BatchNormalization
    train as in `fit` of the model.

    With `privacy`, the update of each client is clipped as one vector, noise is added once to the
    sum, and the sum is divided by the expected number of clients. The number of sampled clients
    varies (`sampling="poisson"`). Statistics of the clients are not sent, so features are not
    scaled (train once on public examples, and they are), and the training loss and metrics are
    withheld: pass `validation_data` that are not the clients'. Sampling, shuffling and noise use
    secret random numbers, and not `seed`, so a run cannot be repeated. The `History` has `epsilon`,
    the budget spent, and `clip`. Training stops before the budget would be passed, and a resumed
    training continues the account; `privacy_report()` states the guarantee and what it does not
    cover. Many clients are needed: the noise is divided by `clients_per_round`. Personal weights
    have no noise, and the files of `checkpoint_dir/clients` tell who took part: keep them secret.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"], optimizer="sgd")
    >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> clients = lp.partition((x, x.sum(1) > 0), clients=10)
    >>> federated = lp.FederatedAveraging(model, clients_per_round=5)
    >>> history = federated.fit(clients, rounds=3, verbose=0)
    >>> len(history.history["loss"])
    3
    >>> sorted(federated.evaluate(clients))[:3]
    ['accuracy', 'clients', 'loss']
    """

    _engine: type[Rounds] = Rounds  # runs the rounds

    def __init__(
        self,
        model: keras.Model,
        *,
        clients_per_round: int | None = None,
        local_epochs: int = 1,
        batch_size: int | None = 20,
        server_optimizer: str | keras.optimizers.Optimizer | None = None,
        proximal_strength: float = 0.0,
        weighting: Weighting | None = None,
        aggregation: Aggregation = "mean",
        compression: Compression | None = None,
        personal_layers: PersonalLayers = None,
        lora_averaging: LoRAAveraging = "separate",
        lora_ranks: Mapping[Hashable, int] | None = None,
        privacy: DifferentialPrivacy | None = None,
        seed: int = 0,
    ) -> None:
        if clients_per_round is not None:
            check_positive("clients_per_round", clients_per_round, integer=True)
        check_positive("local_epochs", local_epochs, integer=True)
        if batch_size is not None:
            check_positive("batch_size", batch_size, integer=True)
        if proximal_strength != 0:
            check_positive("proximal_strength", proximal_strength)
        check_choice("aggregation", aggregation, get_args(Aggregation))
        robust = aggregation != "mean"
        if weighting is None:
            weighting = "uniform" if robust or privacy is not None else "examples"
        check_choice("weighting", weighting, get_args(Weighting))
        if privacy is not None and weighting != "uniform":
            raise ValueError(
                "With `privacy`, all clients must count alike: a client with many examples would "
                f"be protected less. Received: weighting={weighting!r}. Leave it out."
            )
        if robust and (weighting != "uniform" or privacy is not None or len(tasks(model)) > 1):
            raise ValueError(
                "A robust aggregation weights clients equally, for one task and without privacy. "
                f"Received: aggregation={aggregation!r} with weighting={weighting!r}, "
                f"privacy={privacy!r} and {len(tasks(model)) or 1} tasks."
            )
        if compression is not None and not isinstance(compression, Compression):
            raise TypeError(
                "`compression` must be lp.Quantize or lp.TopK. Received: "
                f"compression={compression!r}."
            )
        if compression is not None and privacy is not None:
            raise ValueError(
                "With `privacy`, the noise is added to the sum on the server, after the updates "
                f"were sent. Received: `privacy` and compression={compression!r}. Leave one out."
            )
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"`seed` must be an integer of 0 or more. Received: seed={seed!r}.")
        check_model(model, personal_layers)
        self.model = model
        self.clients_per_round = clients_per_round
        self.seed = int(seed)
        self.rounds_done = 0
        self._local = local = LocalTraining(
            int(local_epochs),
            None if batch_size is None else int(batch_size),
            float(proximal_strength),
        )
        server = make_server_optimizer(server_optimizer)
        feedback = compression is not None and compression.error_feedback
        self._personal = PersonalClients(model, personal_layers, feedback)
        if compression is not None and lora_ranks:
            raise ValueError(
                "Clients with smaller adapters send their updates as they are. Received: "
                f"`lora_ranks` and compression={compression!r}. Leave one out."
            )
        possible = not robust and privacy is None
        exact = check_lora(model, personal_layers, lora_averaging, lora_ranks, possible)
        self._lora_ranks = dict(lora_ranks or {})
        self._rounds = self._engine(
            model, local, server, weighting, compression, aggregation, personal_layers, exact
        )
        self._private = None if privacy is None else PrivateClients(privacy, clients_per_round)
        self._settings = {
            "clients_per_round": clients_per_round and int(clients_per_round),
            "local_epochs": local.epochs,
            "batch_size": local.batch_size,
            "proximal_strength": local.proximal_strength,
            "server_optimizer": describe_optimizer(server),
            "weighting": weighting,
            "aggregation": aggregation if robust else None,
            "compression": compression and repr(compression),
            "personal_layers": (
                list(personal_layers)
                if personal_layers and not isinstance(personal_layers, str)
                else personal_layers
            ),
            "lora_averaging": "exact" if exact else None,
            "lora_ranks": lora_ranks and sorted([repr(k), int(v)] for k, v in lora_ranks.items()),
            "privacy": privacy and dataclasses.asdict(privacy),
            "seed": self.seed,
            "learning_rate": float(model.optimizer.learning_rate),
        }
        self._ends: list[list[Any]] = []  # [last round, stopped by a callback] per call of `fit`
        self._calls = 0
        self._unknown: set[str] = set()  # names of the unknown logs of this round
        self._logs: list[dict[str, Any]] = []  # one dict per round

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
        """Runs rounds of federated averaging and updates the weights of the model.

        A second call continues with the current weights of the model, the state of the server
        optimizer and the round number.

        With `checkpoint_dir`, a killed program that is started again continues after the last saved
        round and ends with the same weights; the sampling of clients is also the same. The state of
        callbacks (such as the patience of EarlyStopping) is not saved, and neither are the
        optimizer and weights from before a call that finished.

        Args:
            clients: a mapping from client ids to `(x, y)` or `(x, y, sample_weight)` arrays, or to
                unbatched `tf.data.Dataset`s of such tuples; a TFF `ClientData` of pairs; or
                `(ids, load)`, a sequence of ids and a function that returns the data of one client.
                Arrays in a dict are checked before the first round. All other data are loaded and
                checked whenever a client is sampled, and are not kept in memory. Sequences may
                differ in length, also within a client, if the size of the input is None and the
                model masks padding (`Embedding(mask_zero=True)`, `Masking`, an input
                `"padding_mask"`).
            rounds: number of rounds to run.
            validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched
                `tf.data.Dataset`, evaluated centrally. Defaults to None.
            validation_freq: number of rounds between validations, or a list of the rounds to
                validate after, starting from 1. Defaults to 1.
            callbacks: a Keras callback or a list of callbacks. A round is an epoch. Defaults to
                None.
            checkpoint_dir: folder for checkpoints. Training continues from the newest undamaged
                checkpoint in it. Defaults to None.
            checkpoint_freq: number of rounds between checkpoints; the last round is always saved.
                Defaults to 1.
            verbose: 0 is silent; `"auto"` and 1 print a line per round, and show a progress bar of
                the running round in a terminal or notebook; 2 prints the lines only. The line has
                at most 100 columns; the `History` has all figures. Defaults to `"auto"`.

        Returns:
            A `keras.callbacks.History` with one epoch per round: `loss` and the metrics over the
            training examples of the clients (measured while they train), `val_*`, `clients`
            (sampled), `dropped` (sampled clients whose update is not finite or exceeds 1e19 and is
            ignored), `update_norm` (L2 norm of the mean update), `bytes_up` and `bytes_down` (bytes
            of the weights sent over all clients, packed if compressed; in the first round also of
            the sums and scales of the features) and `seconds` (without validation). If a task has
            no labels in a round, its loss and metrics are NaN and are not passed to callbacks.

        Raises:
            ValueError: there are no clients or fewer than `clients_per_round`, a client has no
                examples or bad ones, the model has changed since `compile`, a checkpoint is from
                another model or has other settings, or the privacy budget is spent.
            TypeError: `clients` or their data have the wrong type.
            RuntimeError: the TFF worker process died repeatedly in one round.
            ImportError: TensorFlow Federated is not installed.
        """
        check_positive("rounds", rounds, integer=True)
        check_positive("checkpoint_freq", checkpoint_freq, integer=True)
        checks.check_trainable_unchanged(self.model)
        check_model(self.model, self.personal_layers)
        if validation_data is not None and self.personal_layers is not None:
            raise ValueError(
                "With personal layers, each client has a model of its own. Received: "
                f"`validation_data` and personal_layers={self.personal_layers!r}. Call "
                "`evaluate(clients)` after `fit`."
            )
        validate = validation(self.model, validation_data, validation_freq)
        with self._rounds.source(clients) as source:
            self._check_sample(source)
            if self._private is not None:
                self._private.begin(self.model, len(source.ids), rounds)
            checkpoints = self._resume(checkpoint_dir, source)
            first = self._ends[self._calls - 1][0] if self._calls else 0
            last = first + rounds
            if self._calls < len(self._ends):  # the call finished before a restart
                end, stopped = self._ends[self._calls]
                if stopped or self._calls + 1 < len(self._ends):
                    last = end
            if self._private is not None and self.rounds_done == first:
                self._private.check_budget()
            history = self._begin(callbacks, first, last)
            self._stop_if_spent(last, verbose)
            if verbose and self.rounds_done == 0:
                print_restarts(self.model)
            bar = bar_only(verbose)  # the lines of the rounds are below
            compiled = compile_config(self.model)  # a new object with each `compile`
            takes_part = rounds * (self.clients_per_round or len(source.ids)) / len(source.ids)
            statistics = self._personal.fast_statistics(source, takes_part, self._local)
            with contextlib.ExitStack() as stack:
                stack.enter_context(statistics)
                stack.callback(self._end_call, last)
                while self.rounds_done < last and not self.model.stop_training:
                    self._check_compiled(compiled)
                    history.on_epoch_begin(self.rounds_done)
                    label = f"Round {self.rounds_done + 1}/{last}"
                    logs = self._run(source, label, bar, checkpoints)
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
                    self._stop_if_spent(last, verbose)
                    self._save(checkpoints, checkpoint_freq, last)
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
        """Finds the optimal heads on a frozen backbone, for any partition of the examples.

        A linear head on frozen features is a convex problem with a single solution, the minimum of

            J(W, b) = sum_i w_i * loss(y_i, W^T z_i + b) / sum_i w_i + l2 / 2 * |W|^2

        over the examples of all clients. `z` are the features with mean 0 and standard deviation 1,
        `loss` is the loss of the task, and `w` are the sample weights times the class weights, 0
        for missing labels (for `MultiLabel` and `Regression` the sum is over entries). The result
        is the same as if all examples were in one place, even if every client has only one label.
        All clients take part in every round. `clients_per_round`, the optimizers and the other
        arguments of `FederatedAveraging` are not used.

        Clients send only sums over their examples. In the first round these are the count, the sum
        of the features and, with up to 512 features, the sum of their outer products, which reduces
        the number of rounds (with more features, only the sum of squares); for `Regression` also
        the count, sum and squares of the labels. In every later round they are the losses, the
        label weights and the gradients of kernel and bias at the current point of the solver
        (L-BFGS-B of SciPy, on the server). These sums are neither encrypted nor noised, so a client
        with one example reveals its features. Features are computed once per client, even with
        `cache_features=False`. Several heads are solved independently in the same rounds. Dropout
        before a head has no effect.

        With `checkpoint_dir`, a killed program that is started again continues where it stopped and
        ends with the same weights. Use a separate folder for it.

        Args:
            clients: as in `fit`. All clients are loaded.
            l2: strength of the penalty on the weights of the standardised features, above 0.
                Defaults to 1e-3.
            tolerance: the solver stops when the largest entry of the gradient is at most this. The
                gradient is in the coordinates of the solver, in which the loss is about equally
                steep in every direction. Defaults to 1e-6.
            checkpoint_dir: folder for the sums of the clients, one file per round. Defaults to
                None.
            validation_data: as in `fit`, evaluated once with the solution. Defaults to None.
            verbose: 0 is silent; `"auto"` and 1 print a line per round, and show a progress bar in
                a terminal or notebook while clients are loaded; 2 prints the lines only. Defaults
                to `"auto"`.

        Returns:
            A `keras.callbacks.History` with one epoch per round. From the second round on it has
            `loss` (as in `evaluate`, without the penalty; with several tasks also `<name>_loss`)
            and `gradient` (its largest entry). Every round has `clients`, `bytes_up`, `bytes_down`
            and `seconds` as in `fit`. `val_*` have a single value.

        Raises:
            ValueError: a head has hidden layers or a loss other than that of its task, the backbone
                is trainable or random, a task has no labels, features are not finite, a number is
                out of range, or clients or checkpoints are refused as in `fit`.
            TypeError: `clients` or their data have the wrong type.
            RuntimeError: the TFF worker process died repeatedly in one round.
            ImportError: TensorFlow Federated or SciPy is not installed.

        Example:

        >>> import numpy as np, keras, keras_lp as lp
        >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
        >>> model = lp.transfer_model(backbone, ["small", "large"])
        >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
        >>> clients = lp.partition((x, x.sum(1) > 0), clients=5, alpha=0.1)
        >>> history = lp.FederatedAveraging(model).fit_head(clients, verbose=0)
        >>> history.history["loss"][-1] < history.history["loss"][0]
        True

        Reference: Fanì et al., 2024, Accelerating Heterogeneous Federated Learning with
        Closed-form Classifiers (Fed3R, arXiv:2402.05098), for ridge regression.
        """
        if self.personal_layers is not None:
            raise ValueError(
                "`fit_head` solves heads that all clients share. Received: a federation with "
                f"personal_layers={self.personal_layers!r}. Use `fit`."
            )
        if self._private is not None:
            raise ValueError(
                "The sums that solve a head are exact, without noise. Received: `fit_head` of a "
                "federation with `privacy`. Use `fit`, or a federation without `privacy`."
            )
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
        """Evaluates the model on the data of each client. See the example of the class.

        Args:
            clients: as in `fit`. All clients are evaluated.
            verbose: `"auto"` shows a progress bar in a terminal or notebook. 1 also prints lines
                elsewhere; 2 prints lines; 0 is silent. Defaults to `"auto"`.

        Returns:
            A dict with the number of `clients`, and for the loss and each scalar metric: `<name>`
            over all examples, the same as `model.evaluate` on the data of all clients;
            `mean_<name>`, the unweighted mean over the clients that have labels for it; and
            `worst_decile_<name>`, the mean over the worst tenth of these clients (at least one), if
            Keras knows which direction is worse. Values are NaN if no client has labels for them.

        Raises:
            ValueError: there are no clients, or a client has no examples or bad ones.
            TypeError: `clients` or their data have the wrong type.
            ImportError: TensorFlow Federated is not installed.

        Reference: worst decile as in Li et al., 2020, Fair Resource Allocation in Federated
        Learning (arXiv:1905.10497).
        """
        check_model(self.model, self.personal_layers)
        with Source(self.model, clients) as source:
            tff_runtime.load_tff()
            if self.rounds_done and not self._personal.knows_any(source.ids):
                warn(
                    "None of these clients has personal weights, so all are evaluated with the "
                    f"initial ones. Their ids, such as {source.ids[0]!r}, must be those of `fit`."
                )
            with self._rounds.progress("Evaluation", source, source.ids, verbose) as progress:
                results = self._rounds.evaluate(source, progress, self._personal.values)
        return {**summary(self.model, *results), "clients": len(source.ids)}

    def client_model(self, client: Hashable) -> keras.Model:
        """Returns the model of a client, whose personal layers have the client's weights.

        It is a plain Keras model, see `lp.plain_model`. If keras_lp did not build the model of the
        federation, or it has adapters, it is an uncompiled copy of it.

        Args:
            client: the id of a client that took part in a round.

        Raises:
            ValueError: the federation has no `personal_layers`, or the client has no weights yet.
        """
        variables, values = self._personal.of_client(client)
        plain = heads(self.model) and not adapted_layers(self.model)
        copy = plain_model if plain else copy_model
        return with_values(self.model, variables, values, copy)

    @property
    def personal_layers(self) -> PersonalLayers:
        """The layers that stay on the clients."""
        return self._personal.layers

    def privacy_report(self) -> PrivacyReport:
        """Returns the guarantee of the rounds so far: print it.

        Raises:
            ValueError: the federation has no `privacy`, or no round has begun.
        """
        if self._private is None:
            raise ValueError(
                "A privacy report needs a federation with differential privacy. Received: one "
                "without. Pass `privacy=lp.DifferentialPrivacy(...)`."
            )
        return self._private.report()

    def _check_sample(self, source: Source) -> None:
        if self.clients_per_round is not None and self.clients_per_round > len(source.ids):
            raise ValueError(
                "`clients_per_round` must be at most the number of clients. Received: "
                f"clients_per_round={self.clients_per_round} for {len(source.ids)} clients."
            )

    def _check_compiled(self, compiled: Any) -> None:
        if compile_config(self.model) is not compiled:
            raise ValueError(
                "A model must not be recompiled while `fit` runs. Received: model "
                f"{self.model.name!r}, recompiled since round {self.rounds_done}, perhaps by a "
                "callback. Recompile it between two calls of `fit`."
            )

    def _run(
        self, source: Source, label: str, bar: Verbose, checkpoints: Checkpoints | None
    ) -> dict[str, Any]:
        """Runs the next round and returns its logs."""
        if self._private is None:
            sample, rng, private = self._sample(source), self._random(), None
        else:
            shapes = [variable.shape for variable in self._rounds.personal_variables().shared]
            sample, private = self._private.next_round(source.ids, shapes)
            rng, bar = private.random, 0  # the bar would tell how many were sampled
        with self._rounds.progress(label, source, sample, bar) as progress:
            own = [self._personal.values(client) for client in sample]
            ranks = [self._lora_ranks.get(client, ALL_RANKS) for client in sample]
            logs = self._rounds.run(source, sample, rng, progress, private, own, ranks)
        if private is None or private.counts:
            number = self.rounds_done + 1
            self._personal.keep(sample, self._rounds.personal, number, checkpoints)
        if self._private is not None and private is not None:
            counted = len(sample) if private.counts else 0
            logs = {**self._private.end_round(logs.pop("within"), counted), **logs}
        return logs

    def _stop_if_spent(self, last: int, verbose: Verbose) -> None:
        """Ends training if another round would pass the privacy budget."""
        if self._private is None or self.rounds_done == last or self._private.allows():
            return
        self.model.stop_training = True
        if verbose:
            print(f"Training stops after round {self.rounds_done}: the privacy budget is spent.")

    def _sample(self, source: Source) -> list[Any]:
        """Returns the clients of the next round."""
        count = self.clients_per_round or len(source.ids)
        rng = np.random.default_rng((self.seed, self.rounds_done))
        return [source.ids[i] for i in np.sort(rng.choice(len(source.ids), count, replace=False))]

    def _random(self) -> np.random.Generator:
        """Returns the random generator of the clients of the next round."""
        return np.random.default_rng((self.seed, self.rounds_done, 1))

    def _begin(self, callbacks: Callbacks | None, first: int, last: int) -> Any:
        """Starts the callbacks and restores the history of rounds from before a restart."""
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
        elif self._calls + 1 == len(self._ends):  # this call may ask for more rounds than before
            self._ends[-1][0] = max(self._ends[-1][0], min(self.rounds_done, last))
        self._calls += 1

    def _warn_of_dropped(self, logs: dict[str, Any]) -> None:
        names = self._rounds.dropped
        if names:
            warn(
                f"Round {self.rounds_done}: the updates of {len(names)} of {logs['clients']} "
                f"clients were not finite and are ignored: {names[:10]}"
                f"{' and more' if len(names) > 10 else ''}. A smaller learning rate may help.",
            )

    def _resume(
        self, directory: str | os.PathLike[str] | None, source: Source
    ) -> Checkpoints | None:
        """Opens the checkpoint folder and restores the newest checkpoint if it is ahead."""
        if directory is None:
            self._personal.open(None, self.rounds_done)
            return None
        settings = {**self._settings, **describe_model(self.model, self._rounds.folded())}
        settings["clients"] = self._rounds.describe(source)
        checkpoints = Checkpoints(directory, settings)
        found = checkpoints.load()
        if self._private is not None:
            self._private.resume(Path(directory), found and found[2]["privacy"])
        if found is not None and found[0] > self.rounds_done:
            self.rounds_done, arrays, about = found
            self._rounds.restore(arrays)
            self._ends, self._logs = about["ends"], about["logs"]
            if about["learning_rate"] is not None:
                self.model.optimizer.learning_rate = about["learning_rate"]
        self._personal.open(Path(directory), self.rounds_done)
        return checkpoints

    def _save(self, checkpoints: Checkpoints | None, every: int, last: int) -> None:
        ended = self.rounds_done == last or self.model.stop_training
        if checkpoints is None or not (ended or self.rounds_done % every == 0):
            return
        ends = self._ends[: self._calls]
        if ended:
            ends = [*ends, [self.rounds_done, bool(self.model.stop_training)]]
        optimizer = self.model.optimizer
        schedule = isinstance(rate_of(optimizer), keras.optimizers.schedules.LearningRateSchedule)
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
            "privacy": self._private and self._private.state(),
        }
        checkpoints.save(self.rounds_done, self._rounds.arrays(), about)
