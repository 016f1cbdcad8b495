"""What the hypermodels share: arguments, the backbone of all trials, features, schedules."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
import keras_tuner
import numpy as np
from keras_tuner import HyperParameters

from keras_lp.backbones.blocks import blocks_of
from keras_lp.backbones.copying import copy_model
from keras_lp.backbones.features import obstacle
from keras_lp.backbones.resolve import BackboneLike
from keras_lp.model.model import Model
from keras_lp.model.shared_features import SharedFeatures
from keras_lp.tasks.heads import backbone_of
from keras_lp.tuning.callbacks import cheaper
from keras_lp.tuning.space import SHARES, Space, check_names, value_of
from keras_lp.utils.arguments import check_choice
from keras_lp.utils.keras_internals import rate_of, train_validation_split

# Arguments that determine the backbone, and those that determine the features above it.
_OF_BACKBONE = ("input_shape", "image_size", "weights", "backbone_kwargs", "pretrained")
_OF_FEATURES = ("pooling", "cache_features", "cache_memory")
_KEPT = 4  # backbones with different arguments, at most


class BuilderHyperModel(keras_tuner.HyperModel):
    """Base class: a hypermodel whose trials call a builder.

    Args:
        builder: `lp.transfer_model` or `lp.multitask_model`.
        backbone: as in the builder.
        task: task or tasks, as in the builder.
        given: arguments of the builder and of the hypermodel: values, functions of `hp`, or
            `"search"`.
        spaces: the default spaces by argument.
        name: as in `keras_tuner.HyperModel`.
        tunable: as in `keras_tuner.HyperModel`.
    """

    own: ClassVar[tuple[str, ...]] = ("schedule",)  # arguments that the builder does not have

    def __init__(
        self,
        builder: Callable[..., Model],
        backbone: BackboneLike,
        task: Any,
        given: Mapping[str, Any],
        spaces: Mapping[str, Space],
        name: str | None = None,
        tunable: bool = True,
    ) -> None:
        parameters_of = inspect.signature(builder).parameters
        check_names(type(self).__name__, given, [*list(parameters_of)[2:], *self.own])
        self.builder = builder
        frozen = given.get("trainable", parameters_of["trainable"].default) == "head"
        self.backbone = _own(backbone, frozen)
        self.task = task
        self.given = dict(given)
        self.spaces = dict(spaces)
        self._rates: weakref.WeakKeyDictionary[Model, float] = weakref.WeakKeyDictionary()
        self._bases: dict[Any, Model] = {}
        self._features: dict[Any, SharedFeatures] = {}
        super().__init__(name=name, tunable=tunable)

    def values(self, hp: HyperParameters) -> dict[str, Any]:
        """Returns the arguments of one trial by name."""
        return {name: value_of(name, given, hp, self.spaces) for name, given in self.given.items()}

    def build(self, hp: HyperParameters) -> Model:
        """Returns the compiled model of a trial.

        Args:
            hp: the hyperparameters of the trial.
        """
        values = self.values(hp)
        check_choice("schedule", values.get("schedule", "constant"), ["constant", "cosine"])
        model = self.make(values)
        if values.get("schedule") == "cosine" and isinstance(
            rate_of(model.optimizer), keras.optimizers.schedules.LearningRateSchedule
        ):
            raise ValueError(
                'schedule="cosine" decays a learning rate that is a number. Received: '
                f'learning_rate={values.get("learning_rate")!r}. Pass schedule="constant".'
            )
        # Weights that a tuner loads later include the decayed rate.
        self._rates[model] = float(model.optimizer.learning_rate)
        return model

    def fit(self, hp: HyperParameters, model: Model, *args: Any, **kwargs: Any) -> Any:
        """Trains the model of a trial and returns its `History`.

        The features of a frozen backbone are computed once for all trials.

        Args:
            hp: the hyperparameters of the trial.
            model: the output of `build(hp)`.
            *args: arguments of `fit` of the model.
            **kwargs: arguments of `fit` of the model.
        """
        values = self.values(hp)
        arguments = fit_arguments(model, args, kwargs)
        if obstacle(model) is None and self.is_shared(values):
            arguments = self.shared_features(values).replace(arguments)
        arguments["callbacks"] = cheaper(arguments.get("callbacks") or [])
        return model.fit(**self._with_schedule(arguments, model, values))

    def _with_schedule(
        self, arguments: dict[str, Any], model: Model, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns arguments of `fit` with a callback that decays the learning rate by epoch."""
        if values.get("schedule", "constant") == "constant":
            return arguments
        highest, epochs = self._rates[model], arguments.get("epochs", 1)

        def rate(epoch: int) -> float:
            return highest * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

        decay = keras.callbacks.LearningRateScheduler(rate)
        return {**arguments, "callbacks": [decay, *(arguments.get("callbacks") or [])]}

    def make(self, values: Mapping[str, Any]) -> Model:
        """Returns the compiled model of a trial.

        Args:
            values: the output of `values(hp)`.
        """
        return self.from_backbone(
            {name: value for name, value in values.items() if name not in self.own}
        )

    def layers_to_train(self, values: Mapping[str, Any]) -> Any:
        """Returns the argument `trainable` of a builder: a share of the blocks as their number."""
        chosen = values.get("trainable")
        if not isinstance(chosen, str) or chosen not in SHARES:
            return chosen
        base: Any = backbone_of(self._base(values))
        return max(1, round(SHARES[chosen] * len(blocks_of([base]))))

    def from_backbone(self, arguments: Mapping[str, Any]) -> Model:
        """Calls the builder; the frozen part of the models is shared by all trials."""
        arguments = {name: _fresh(value) for name, value in arguments.items()}
        if not self.is_shared(arguments):
            return self.builder(self.backbone, self.task, **arguments)
        above = {name: value for name, value in arguments.items() if name not in _OF_BACKBONE}
        if "trainable" in above:
            above["trainable"] = self.layers_to_train(arguments)
        if above.get("trainable", "head") != "head":  # only features of a frozen one are cached
            above = {name: v for name, v in above.items() if not name.startswith("cache_")}
        return self.builder(self._base(arguments), self.task, **above)

    def is_shared(self, values: Mapping[str, Any]) -> bool:
        """Whether the trials start from the same pretrained backbone, loaded once."""
        pretrained = values.get("pretrained")
        if pretrained is None:
            pretrained = values.get("weights", "imagenet") is not None
        return bool(pretrained)

    def _base(self, values: Mapping[str, Any]) -> Model:
        """Returns the model with a frozen backbone whose weights all trials start from."""
        key = _key(values)
        if key not in self._bases:
            self._forget_oldest()
            with warnings.catch_warnings():  # the models of trials train copies
                warnings.filterwarnings("ignore", "A backbone object keeps its weights")
                base = self.builder(self.backbone, self.task, trainable="head", **_below(values))
            self._bases[key] = base
        return self._bases[key]

    def shared_features(self, values: Mapping[str, Any]) -> SharedFeatures:
        """Returns the features of the backbone of a trial."""
        base, key = self._base(values), _key(values)
        if key not in self._features:
            self._features[key] = SharedFeatures(base)
        return self._features[key]

    def forget_features(self) -> None:
        """Frees the memory and the files of the features."""
        self._features.clear()

    def _forget_oldest(self) -> None:
        while len(self._bases) >= _KEPT:
            oldest = next(iter(self._bases))
            del self._bases[oldest]
            self._features.pop(oldest, None)


def _below(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that determine the features."""
    return {name: values[name] for name in (*_OF_BACKBONE, *_OF_FEATURES) if name in values}


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted(_below(values).items()))


def fit_arguments(model: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a call of `fit` by name."""
    return dict(inspect.signature(model.fit).bind(*args, **kwargs).arguments)


def split_off(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of `fit` with `validation_data` for a `validation_split`."""
    split = arguments.get("validation_split")
    if not split or arguments.get("validation_data") is not None:
        return arguments
    names = ("x", "y", "sample_weight")
    parts, held_out = train_validation_split(tuple(arguments.get(n) for n in names), split)
    new = {**arguments, **dict(zip(names, parts, strict=True)), "validation_data": held_out}
    return {name: value for name, value in new.items() if name != "validation_split"}


def _fresh(value: Any) -> Any:
    """Returns a new object for an optimizer or a layer, whose state trials would share."""
    if isinstance(value, (keras.optimizers.Optimizer, keras.Layer)):
        return type(value).from_config(value.get_config())
    return value


def _own(backbone: Any, frozen: bool) -> Any:
    """Returns a copy of a model object, so that nothing else changes what trials start from.

    A frozen backbone that cannot be copied is shared.
    """
    if not isinstance(backbone, keras.Model):
        return backbone
    try:
        return copy_model(backbone_of(backbone) or backbone)
    except Exception as error:  # layers of users raise what they like in `from_config`
        if frozen:
            return backbone
        raise ValueError(
            "Each trial trains its own copy of the backbone, so its layers must be copied. "
            f"Received: model {backbone.name!r}, which cannot be copied: {error} Save it and pass "
            "the .keras file."
        ) from error


def seed_trial(seed: int, trial_id: str) -> None:
    """Seeds everything that a trial draws, so that a trial that is run again is the same."""
    state = np.random.SeedSequence([seed, *trial_id.encode()]).generate_state(1)
    keras.utils.set_random_seed(int(state[0]))
