"""Balancing: the weight of each task in a training step of a multitask model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import keras
import numpy as np
from keras import ops

from keras_lp.balancing import gramian as of_gramian
from keras_lp.tasks.regression import Regression
from keras_lp.tasks.task import Task, is_number
from keras_lp.utils.arguments import check_choice, check_positive


@keras.saving.register_keras_serializable("keras_lp")
class Balancing(keras.layers.Layer):
    """Base class of balancing methods. It weights all tasks equally, like `"equal"`.

    It is a layer between the backbone and the heads that returns the features unchanged; its
    settings and state are saved with the model. Your own method overrides `task_weights`, and
    must be registered like any custom Keras layer.

    The weights apply to the losses that `"equal"` adds up: the mean loss of each task over its
    labels, for `MultiLabel` times the number of labels, multiplied by the task's own `weight`.

    Without gradients (the default), the step follows the weighted sum of the losses. With
    `uses_gradients = True`, each task has its own gradient g_i of the shared parameters (those of
    the backbone). The shared parameters follow the sum of w_i g_i, and each head follows its own
    task.

    Args:
        tasks: dict of the tasks by name, set by the builder. Defaults to None.
        **kwargs: arguments of `keras.layers.Layer`.

    Example:

    >>> import keras, keras_lp as lp
    >>> @keras.saving.register_keras_serializable("my_project")
    ... class Shortest(lp.Balancing):
    ...     "Follows the task with the smallest gradient."
    ...     uses_gradients = True
    ...
    ...     def task_weights(self, losses, gramian):
    ...         squares = keras.ops.diagonal(gramian)
    ...         return keras.ops.cast(squares == keras.ops.min(squares), "float32")
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.multitask_model(backbone, {"a": 3, "b": 3}, balancing=Shortest())
    """

    uses_gradients: ClassVar[bool] = False

    def __init__(self, tasks: Mapping[str, Task] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"name": "balancing", **kwargs})
        self.supports_masking = True
        self.tasks = dict(tasks or {})
        # For the logs of `fit`: means over the steps of an epoch that had labels of the task.
        self.weight_means = [keras.metrics.Mean(name=f"{task}_weight") for task in self.tasks]
        if self.uses_gradients:
            self.cosine_mean = keras.metrics.Mean(name="gradient_cosine")

    def call(self, features: Any) -> Any:
        """Returns the features unchanged."""
        return features

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        """Returns the weights of the tasks, `(tasks,)`, in this step.

        Args:
            losses: `(tasks,)` losses of the batch; 0 for a task without labels in it.
            gramian: with `uses_gradients`, the `(tasks, tasks)` inner products of the tasks'
                gradients of the shared parameters, scaled to a mean square of 1; 0 for a task
                without labels. Else None.
        """
        return ops.ones_like(losses)

    def update(self, losses: Any, gramian: Any, present: Any) -> None:
        """Updates the state after a step. The default does nothing.

        Args:
            losses: as in `task_weights`.
            gramian: as in `task_weights`.
            present: `(tasks,)` booleans, False for a task without labels; do not change its state.
        """

    def end_epoch(self, losses: Mapping[str, float]) -> None:
        """Updates the state at the end of an epoch of `fit`. The default does nothing.

        Args:
            losses: the mean loss of each task that had labels in the epoch.
        """

    def record(self, weights: Any, gramian: Any, present: Any) -> None:
        """Updates the values that `fit` logs."""
        for i, mean in enumerate(self.weight_means):
            mean.update_state(weights[i], ops.cast(present[i], "float32"))
        if self.uses_gradients:
            self.cosine_mean.update_state(*of_gramian.mean_cosine(gramian))

    def state(self, name: str, value: float) -> keras.Variable:
        """Returns a new variable with one number per task, which is saved with the model."""
        return self.add_weight(
            (len(self.tasks),),
            initializer=keras.initializers.Constant(value),
            trainable=False,
            name=name,
            dtype="float32",
            aggregation="mean",
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer, with the tasks in it."""
        tasks = {n: keras.saving.serialize_keras_object(task) for n, task in self.tasks.items()}
        return {**super().get_config(), "tasks": tasks}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Balancing:
        """Creates the layer from `get_config()`."""
        tasks = config.get("tasks", {})
        tasks = {n: keras.saving.deserialize_keras_object(task) for n, task in tasks.items()}
        return cls(**{**config, "tasks": tasks})


@keras.saving.register_keras_serializable("keras_lp")
class Uncertainty(Balancing):
    """Weights each task by its learned noise: the smaller the noise, the larger the weight.

    It minimises exp(-s) L + n s / 2 for a classification task and exp(-s) L / 2 + s / 2 for a
    regression, also over the log variance s of each task. n is 1, or the number of labels of a
    `MultiLabel`, which share one s. The log variance has its own update, which follows its gradient
    divided by n: the optimizer of the model would also change s in batches without the task.

    Args:
        learning_rate: learning rate of the log variances, which start at 0. Defaults to 0.025.
        **kwargs: as in `lp.Balancing`.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.Uncertainty(learning_rate=0.01)  # as `balancing` of the builder

    Reference: Kendall et al., 2018, Multi-Task Learning Using Uncertainty to Weigh Losses for
    Scene Geometry and Semantics (arXiv:1705.07115).
    """

    def __init__(self, learning_rate: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("learning_rate", learning_rate)
        self.learning_rate = learning_rate
        self._factors = [
            0.5 if isinstance(task, Regression) else 1.0 for task in self.tasks.values()
        ]
        self._counts = [float(task.label_count) for task in self.tasks.values()]

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.log_variances = self.state("log_variances", 0.0)

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return ops.exp(-self.log_variances) * ops.convert_to_tensor(self._factors, "float32")

    def update(self, losses: Any, gramian: Any, present: Any) -> None:
        each = losses / ops.convert_to_tensor(self._counts, "float32")
        slope = 0.5 - self.task_weights(losses, gramian) * each
        moved = self.log_variances - self.learning_rate * slope
        self.log_variances.assign(ops.where(present, moved, self.log_variances))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "learning_rate": self.learning_rate}


@keras.saving.register_keras_serializable("keras_lp")
class DWA(Balancing):
    """Dynamic weight average: tasks whose loss fell less in the last epoch get larger weights.

    Applies from the third epoch of `fit` on. A custom loop over batches keeps equal weights.

    Args:
        temperature: above 0; a large value makes the weights equal. Defaults to 2.
        **kwargs: as in `lp.Balancing`.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.DWA(temperature=1.0)  # as `balancing` of the builder

    Reference: Liu et al., 2019, End-to-End Multi-Task Learning with Attention
    (arXiv:1803.10704).
    """

    def __init__(self, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.weights_now = self.state("weights", 1.0)
        self.last_losses = self.state("last_losses", 0.0)  # 0: none yet
        self.ratios = self.state("ratios", 1.0)

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return ops.convert_to_tensor(self.weights_now)

    def end_epoch(self, losses: Mapping[str, float]) -> None:
        last, ratios = np.array(self.last_losses), np.array(self.ratios)
        for i, task in enumerate(self.tasks):
            if task in losses:
                ratios[i] = losses[task] / last[i] if last[i] > 0 else 1.0
                last[i] = losses[task]
        powers = np.exp((ratios - ratios.max()) / self.temperature)
        self.last_losses.assign(last)
        self.ratios.assign(ratios)
        self.weights_now.assign(len(powers) * powers / powers.sum())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable("keras_lp")
class GradNorm(Balancing):
    """Balances the sizes of the gradients, larger for tasks that learn more slowly than others.

    Args:
        alpha: how strongly slow tasks are favoured; 0 makes all sizes equal. Defaults to 1.5.
        learning_rate: learning rate of the weights. Defaults to 0.025.
        **kwargs: as in `lp.Balancing`.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.GradNorm(alpha=0.5)  # as `balancing` of the builder

    Reference: Chen et al., 2018, GradNorm (arXiv:1711.02257); here for all shared parameters.
    """

    uses_gradients = True

    def __init__(self, alpha: float = 1.5, learning_rate: float = 0.025, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(alpha, (int, float)) or alpha < 0:
            raise ValueError(f"`alpha` must be a number of 0 or more. Received: alpha={alpha!r}.")
        check_positive("learning_rate", learning_rate)
        self.alpha = alpha
        self.learning_rate = learning_rate

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.weights_now = self.state("weights", 1.0)
        self.first_losses = self.state("first_losses", 0.0)  # 0: none yet

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return ops.convert_to_tensor(self.weights_now)

    def update(self, losses: Any, gramian: Any, present: Any) -> None:
        here = ops.cast(present, "float32")
        count = ops.maximum(ops.sum(here), 1)
        weights = ops.convert_to_tensor(self.weights_now)
        new = ops.logical_and(present, self.first_losses <= 0)
        first = ops.where(new, losses, self.first_losses)
        left = losses / ops.where(first > 0, first, 1.0)  # relative to the first loss
        left = left / ops.maximum(ops.sum(left * here) / count, 1e-8)
        sizes = ops.sqrt(ops.maximum(ops.diagonal(gramian), 0))
        weighted = weights * sizes
        wanted = ops.sum(weighted * here) / count * left**self.alpha
        slope = ops.sign(weighted - wanted) * sizes
        moved = ops.maximum(weights - self.learning_rate * slope, 1e-3)
        # Keeps the sum of the weights of the tasks in this batch.
        moved = moved * ops.sum(weights * here) / ops.maximum(ops.sum(moved * here), 1e-8)
        self.first_losses.assign(first)
        self.weights_now.assign(ops.where(present, moved, weights))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "alpha": self.alpha, "learning_rate": self.learning_rate}


@keras.saving.register_keras_serializable("keras_lp")
class PCGrad(Balancing):
    """Removes from each task's gradient its conflict with each other one, in a random order.

    Args:
        seed: seed of the random order. Defaults to 0.
        **kwargs: as in `lp.Balancing`.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.PCGrad(seed=1)  # as `balancing` of the builder

    Reference: Yu et al., 2020, Gradient Surgery for Multi-Task Learning (arXiv:2001.06782).
    """

    uses_gradients = True

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self._random = keras.random.SeedGenerator(seed)

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        count = len(self.tasks)
        order = ops.argsort(keras.random.uniform((count, count), seed=self._random), axis=-1)
        return of_gramian.pcgrad_weights(gramian, order)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}


@keras.saving.register_keras_serializable("keras_lp")
class CAGrad(Balancing):
    """The update that helps the worst task most, within a distance from the mean gradient.

    Args:
        c: the distance, relative to the length of the mean gradient; 0 gives the plain sum, and a
            large value approaches MGDA. Defaults to 0.5.
        **kwargs: as in `lp.Balancing`.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.CAGrad(c=0.4)  # as `balancing` of the builder

    Reference: Liu et al., 2021, Conflict-Averse Gradient Descent for Multi-task Learning
    (arXiv:2110.14048).
    """

    uses_gradients = True

    def __init__(self, c: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(c, (int, float)) or c < 0:
            raise ValueError(f"`c` must be a number of 0 or more. Received: c={c!r}.")
        self.c = c

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return of_gramian.cagrad_weights(gramian, self.c)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "c": self.c}


@keras.saving.register_keras_serializable("keras_lp")
class MGDA(Balancing):
    """The shortest vector in the convex hull of the gradients.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.MGDA()  # as `balancing` of the builder

    Reference: Sener and Koltun, 2018, Multi-Task Learning as Multi-Objective Optimization
    (arXiv:1810.04650).
    """

    uses_gradients = True

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return of_gramian.mgda_weights(gramian)


@keras.saving.register_keras_serializable("keras_lp")
class IMTLG(Balancing):
    """The update that has equal projections on the directions of all tasks' gradients.

    Example:

    >>> import keras_lp as lp
    >>> balancing = lp.balancing.IMTLG()  # as `balancing` of the builder

    Reference: Liu et al., 2021, Towards Impartial Multi-task Learning (ICLR).
    """

    uses_gradients = True

    def task_weights(self, losses: Any, gramian: Any) -> Any:
        return of_gramian.imtl_weights(gramian)


BalancingName = Literal[
    "equal", "sum", "uncertainty", "dwa", "gradnorm", "pcgrad", "cagrad", "mgda", "imtl_g"
]
BalancingLike = BalancingName | Mapping[str, float] | Balancing

METHODS: dict[str, type[Balancing]] = {
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "mgda": MGDA,
    "imtl_g": IMTLG,
}


def as_balancing(balancing: BalancingLike, tasks: Mapping[str, Task]) -> Balancing | None:
    """Returns a new layer for these tasks, None for a sum of the losses with fixed weights.

    Raises:
        ValueError: if a name is unknown, or the weights do not match the tasks.
        TypeError: if `balancing` is anything else.
    """
    if isinstance(balancing, Mapping):
        if set(balancing) != set(tasks):
            raise ValueError(
                f"`balancing` as a dict needs a weight for each of the tasks {list(tasks)}. "
                f"Received: balancing={dict(balancing)}."
            )
        if not all(is_number(w) and 0 <= w < float("inf") for w in balancing.values()):
            raise ValueError(
                "Each weight of `balancing` must be a number of 0 or more. Received: "
                f"balancing={dict(balancing)}."
            )
        return None
    if isinstance(balancing, Balancing):
        return type(balancing).from_config({**balancing.get_config(), "tasks": _packed(tasks)})
    if not isinstance(balancing, str):
        raise TypeError(
            "`balancing` must be a name, a dict of weights by task or an lp.Balancing(). "
            f"Received: balancing={balancing!r}."
        )
    check_choice("balancing", balancing, get_args(BalancingName))
    return None if balancing in ("equal", "sum") else METHODS[balancing](tasks=tasks)


def fixed_weights(balancing: BalancingLike, tasks: Mapping[str, Task]) -> dict[str, float]:
    """Returns the factor of each task's mean loss in `loss`, without the task's own weight."""
    if isinstance(balancing, str) and balancing == "sum":
        return dict.fromkeys(tasks, 1.0)
    given = balancing if isinstance(balancing, Mapping) else dict.fromkeys(tasks, 1.0)
    return {name: given[name] * task.label_count for name, task in tasks.items()}


def _packed(tasks: Mapping[str, Task]) -> dict[str, Any]:
    return {name: keras.saving.serialize_keras_object(task) for name, task in tasks.items()}


def balancing_of(model: keras.Model) -> Balancing | None:
    """Returns the layer that balances the tasks of a model, None for a sum of the losses."""
    return next((layer for layer in model.layers if isinstance(layer, Balancing)), None)
