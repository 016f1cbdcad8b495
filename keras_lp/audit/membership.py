"""`audit_membership`: can one tell which examples a model was trained on?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import stats

from keras_lp.audit.labels import check_present
from keras_lp.audit.twin import still
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.page import paragraphs, preformatted
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText, text_table

LEAST = 100  # examples of each kind
FALSE_POSITIVES = 0.01
LEVEL = 0.025
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class MembershipResult:
    """How well an attack tells members from others.

    Attributes:
        auc: the probability that a member has a higher score than another example.
        auc_interval: its 95 % interval (DeLong et al., 1988).
        true_positives: the share of members found while at most 1 % of the others are taken for
            members.
        true_positives_interval: its 95 % interval (Clopper and Pearson, 1934), for this threshold.
        tells: whether the attack does better than guessing: the interval of the AUC is above 0.5,
            or significantly more members than others are found (Fisher's exact test, 2.5 %).
    """

    auc: float
    auc_interval: tuple[float, float]
    true_positives: float
    true_positives_interval: tuple[float, float]
    tells: bool


@dataclasses.dataclass(repr=False)
class MembershipLeakage(ShownAsText):
    """The output of `lp.audit_membership`. Printing it shows a table and a verdict.

    Attributes:
        members: number of examples that the model was trained on.
        others: number of examples that it has not seen.
        results: `MembershipResult` by the name of the attack.
    """

    members: int
    others: int
    results: dict[str, MembershipResult]

    @property
    def verdict(self) -> str:
        """What the figures mean, in sentences."""
        found = [name for name, result in self.results.items() if result.tells]
        if found:
            text = f"The model reveals who was in its training data ({' and '.join(found)})."
        else:
            text = "These attacks do not tell members from others. A stronger one may."
        if len(self.results) == 1:
            text += "\nThe likelihood ratio, a stronger attack, was not tried: it needs `train`."
        return text

    def __str__(self) -> str:
        return f"{self._table()}\n\n{self.verdict}"

    def section(self) -> list[str]:
        """Returns the parts of a section of a page."""
        return [paragraphs(self.verdict), preformatted(self._table())]

    def _table(self) -> str:
        rows = [["attack", "AUC", "95 % interval", "found at 1 % false positives", "interval"]]
        for name, one in self.results.items():
            auc, found = one.auc_interval, one.true_positives_interval
            rows.append(
                [
                    name,
                    f"{one.auc:.3f}",
                    f"{auc[0]:.3f} to {auc[1]:.3f}",
                    f"{one.true_positives:.1%}",
                    f"{found[0]:.1%} to {found[1]:.1%}",
                ]
            )
        title = f"Attack on {self.members:,} members and {self.others:,} others; guessing: AUC 0.5"
        return "\n".join([title, text_table(rows, left=1)])


def audit_membership(
    model: keras.Model,
    members: tuple[Any, Any],
    others: tuple[Any, Any],
    *,
    train: Callable[[Any, Any], keras.Model] | None = None,
    shadow_models: int = 8,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> MembershipLeakage:
    """Attacks a model to tell which examples it was trained on.

    | attack | an example is taken for a member if |
    |---|---|
    | loss threshold | its loss is low |
    | likelihood ratio | its loss is more like that of models trained with it than of models \
trained without it; needs `train` |

    The likelihood ratio (LiRA, online) trains `shadow_models` models, each on a random half of all
    examples. Its Gaussians have one variance for all examples, as Carlini et al. do with few
    models.

    Args:
        model: a compiled model.
        members: `(x, y)` that it was trained on, at least 100 examples.
        others: `(x, y)` of the same kind that it has not seen, at least 100 examples. If they come
            from another source, the attacks tell the sources apart.
        train: function `(x, y) -> model` that trains a new model in the same way. Defaults to None:
            only the loss threshold.
        shadow_models: number of models that `train` makes, an even number. Defaults to 8.
        seed: random seed of the halves. Defaults to 0.
        verbose: as in `FederatedAveraging.evaluate`. Defaults to `"auto"`.

    Returns:
        `MembershipLeakage`: print it; `save` of `lp.audit_update_leakage` puts it on a page.

    Raises:
        ValueError: if the model is not compiled, there are too few examples, labels are missing,
            losses are not finite or below 0, or `shadow_models` is not even.
        TypeError: if `train` does not return a model.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> x = np.random.default_rng(0).normal(size=(400, 20)).astype("float32")
    >>> y = np.random.default_rng(1).integers(0, 2, 400)
    >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(200, "relu")])
    >>> model = lp.transfer_model(backbone, 2)
    >>> history = lp.fit_head(model, (x[:200], y[:200]), l2=1e-6, verbose=0)
    >>> audit = lp.audit_membership(model, (x[:200], y[:200]), (x[200:], y[200:]))
    >>> audit.results["loss threshold"].auc > 0.6
    True

    References: Yeom et al., 2018, Privacy Risk in Machine Learning (arXiv:1709.01604); Carlini et
    al., 2022, Membership Inference Attacks From First Principles (arXiv:2112.03570).
    """
    if not isinstance(model, keras.Model) or not getattr(model, "compiled", False):
        raise ValueError(f"An audit needs a compiled Keras model. Received: {model!r}.")
    check_positive("shadow_models", shadow_models, integer=True)
    if shadow_models % 2:
        raise ValueError(
            "`shadow_models` must be even, so that each example is in half of the models. "
            f"Received: shadow_models={shadow_models}."
        )
    members, others = _arrays("members", members), _arrays("others", others)
    for data in (members, others):
        check_present(model, data[1])
    counts = [len(keras.tree.flatten(data)[0]) for data in (members, others)]
    pool = keras.tree.map_structure(lambda *parts: np.concatenate(parts), members, others)
    is_member = np.arange(sum(counts)) < counts[0]
    own = confidences(model, *pool)
    results = {"loss threshold": _result(own, is_member)}
    if train is not None:
        inside, shadows = halves(sum(counts), shadow_models, seed), []
        with Progress("Shadow models", shadow_models, verbose) as progress:
            for chosen in inside:
                x, y = keras.tree.map_structure(lambda array, c=chosen: array[c], pool)
                shadow = train(x, y)
                if not isinstance(shadow, keras.Model):
                    raise TypeError(
                        f"`train` must return a model. Received: {type(shadow).__name__}."
                    )
                shadows.append(confidences(shadow, *pool))
                progress.step(1)
        ratios = likelihood_ratios(own, np.array(shadows), inside)
        results["likelihood ratio"] = _result(ratios, is_member)
    return MembershipLeakage(counts[0], counts[1], results)


def confidences(model: Any, x: Any, y: Any) -> np.ndarray:
    """Returns how sure a model is of each label, the logit of `exp(-loss)`, `(examples,)`."""
    x, y = (keras.tree.map_structure(np.asarray, part) for part in (x, y))

    @tf.autograph.experimental.do_not_convert
    def loss(label: Any, output: Any) -> tf.Tensor:
        label, output = keras.tree.map_structure(lambda one: one[None], (label, output))
        with still(model):
            value = model.compute_loss(None, label, output, None, training=False)
            return tf.cast(value - sum(model.losses), tf.float64)

    batches = []
    for start in range(0, len(keras.tree.flatten(y)[0]), _BATCH):
        rows = slice(start, start + _BATCH)
        batch = keras.tree.map_structure(lambda one, r=rows: tf.convert_to_tensor(one[r]), (x, y))
        outputs = model(batch[0], training=False)
        if isinstance(outputs, (list, tuple)):
            raise ValueError(
                "The outputs of a model with several tasks must be a dict. Received: model "
                f"{model.name!r} with a list of outputs."
            )
        # `tf.data` computes in a graph, and does not warn of one graph per model.
        data = tf.data.Dataset.from_tensor_slices((batch[1], outputs)).map(loss)
        batches.append(data.batch(_BATCH).get_single_element().numpy())
    losses = np.concatenate(batches)
    if losses.min() < -1e-5:
        raise ValueError(
            "The loss must be 0 or more, as a cross-entropy or a squared error is. Received: "
            f"losses down to {losses.min():.3g}."
        )
    losses = np.maximum(losses, 1e-12)
    if not np.isfinite(losses).all():
        raise ValueError(
            "The loss of each example must be finite. Received: "
            f"{int((~np.isfinite(losses)).sum())} that are not."
        )
    return -losses - np.log(-np.expm1(-losses))


def halves(count: int, models: int, seed: int) -> np.ndarray:
    """Returns which examples each model is trained on, each in half of them: `(models, count)`."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(models // 2):
        chosen = rng.permutation(count) < count // 2
        found += [chosen, ~chosen]
    return np.array(found)


def likelihood_ratios(own: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Returns the logarithm of each example's likelihood ratio of being a member.

    Args:
        own: confidences of the attacked model, `(examples,)`.
        shadows: those of the shadow models, `(models, examples)`.
        inside: which examples each shadow model was trained on, `(models, examples)`.
    """
    logs = []
    for used in (inside, ~inside):
        counts = used.sum(0)
        mean = np.where(used, shadows, 0).sum(0) / counts
        squares = np.where(used, (shadows - mean) ** 2, 0)
        freedom = max(int((counts - 1).sum()), 1)
        deviation = np.sqrt(squares.sum() / freedom) or 1.0
        logs.append(stats.norm.logpdf(own, mean, deviation))
    return np.asarray(logs[0] - logs[1])


def _arrays(name: str, data: Any) -> tuple[Any, Any]:
    """Returns a pair (x, y) of arrays, or dicts of arrays."""
    if not isinstance(data, tuple) or len(data) != 2:
        raise ValueError(f"`{name}` must be a pair (x, y). Received: {type(data).__name__}.")
    x, y = (
        {key: np.asarray(one) for key, one in part.items()}
        if isinstance(part, Mapping)
        else np.asarray(part)
        for part in data
    )
    lengths = {len(one) if one.ndim else 0 for one in keras.tree.flatten((x, y))}
    if len(lengths) != 1 or min(lengths) < LEAST:
        raise ValueError(
            f"`{name}` must have at least {LEAST} examples, as many labels as inputs. Received: "
            f"{sorted(lengths)}."
        )
    return x, y


def _result(scores: np.ndarray, is_member: np.ndarray) -> MembershipResult:
    members, others = scores[is_member], scores[~is_member]
    area, interval = auc(members, others)
    allowed = int(FALSE_POSITIVES * len(others))
    count = int((members > np.sort(others)[::-1][allowed]).sum())
    found = stats.binomtest(count, len(members))
    ends = found.proportion_ci()
    table = [[count, len(members) - count], [allowed, len(others) - allowed]]
    more = stats.fisher_exact(table, alternative="greater").pvalue < LEVEL
    return MembershipResult(
        auc=area,
        auc_interval=interval,
        true_positives=float(found.statistic),
        true_positives_interval=(float(ends.low), float(ends.high)),
        tells=bool(interval[0] > 0.5 or more),
    )


def auc(members: np.ndarray, others: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns the area under the ROC curve and its 95 % interval (DeLong et al., 1988)."""
    m, n = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    of_members = (ranks[:m] - stats.rankdata(members)) / n
    of_others = 1 - (ranks[m:] - stats.rankdata(others)) / m
    area = float(of_members.mean())
    deviation = np.sqrt(of_members.var(ddof=1) / m + of_others.var(ddof=1) / n)
    margin = float(stats.norm.ppf(0.975) * deviation)
    return area, (max(0.0, area - margin), min(1.0, area + margin))
