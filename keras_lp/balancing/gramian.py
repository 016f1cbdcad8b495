"""Weights of task gradients from their Gramian M, M[i, j] = <g_i, g_j>.

Each function takes a `(tasks, tasks)` Gramian and returns `(tasks,)` weights w. The shared
parameters then follow the sum of w_i g_i. Scaling the whole Gramian does not change the weights.
If all tasks have the same gradient, the weights sum to the number of tasks, as in the plain sum
(with CAGrad to 1 + c times that number, as in its paper). A task with a zero gradient gets a
weight of 0 and does not affect the others.
"""

from __future__ import annotations

from typing import Any

from keras import ops

_TINY = 1e-12
_ITERATIONS = 100  # at most
_STILL = 1e-6  # stop after a step that moves the weights (of sum 1) by less


def pcgrad_weights(gramian: Any, order: Any) -> Any:
    """Removes from each gradient its conflicting part with each other one, then sums them.

    Yu et al., 2020, Gradient Surgery for Multi-Task Learning (arXiv:2001.06782).

    Args:
        gramian: the Gramian.
        order: `(tasks, tasks)`; row i is the order in which gradient i is compared with the others.
    """
    count = gramian.shape[0]
    squares = ops.maximum(ops.diagonal(gramian), _TINY)
    coefficients = ops.eye(count)  # row i: gradient i as a combination of the original ones
    own = ops.eye(count, dtype="bool")
    for step in range(count):
        other = order[:, step]
        products = ops.sum(coefficients * ops.take(gramian, other, axis=0), axis=1)
        conflict = ops.minimum(products, 0) / ops.take(squares, other)
        met = ops.one_hot(other, count)
        conflict = ops.where(ops.any(ops.logical_and(met > 0, own), axis=1), 0.0, conflict)
        coefficients = coefficients - conflict[:, None] * met
    return ops.sum(coefficients, axis=0) * _present(gramian)


def mgda_weights(gramian: Any) -> Any:
    """The shortest vector in the convex hull of the gradients, times the number of tasks.

    Désidéri, 2012; Sener and Koltun, 2018, Multi-Task Learning as Multi-Objective Optimization
    (arXiv:1810.04650).
    """
    gramian = _normalised(gramian)
    linear = ops.zeros_like(ops.diagonal(gramian))
    return _count(gramian) * _minimise_on_simplex(gramian, linear, ops.ones(()))


def cagrad_weights(gramian: Any, c: float) -> Any:
    """The update that helps the worst task most, within `c` lengths of the mean gradient from it.

    Liu et al., 2021, Conflict-Averse Gradient Descent for Multi-task Learning (arXiv:2110.14048).
    """
    gramian = _normalised(gramian)
    equal = _present(gramian) / _count(gramian)
    radius = c * ops.sqrt(_square(gramian, equal))
    worst = _minimise_on_simplex(gramian, ops.matmul(gramian, equal), radius)
    length = ops.sqrt(_square(gramian, worst))
    return _count(gramian) * (equal + radius / ops.maximum(length, 1e-6) * worst)


def imtl_weights(gramian: Any) -> Any:
    """The update that has equal projections on the directions of all gradients.

    Liu et al., 2021, Towards Impartial Multi-task Learning (ICLR), the part for gradients.
    """
    gramian = _normalised(gramian)
    present = _present(gramian)
    lengths = ops.sqrt(ops.maximum(ops.diagonal(gramian), 0))
    # Uses directions, so that the scale of a task's loss does not affect the accuracy.
    safe = ops.where(present > 0, lengths, 1.0)
    cosines = gramian / (safe[:, None] * safe[None, :])
    count = gramian.shape[0]
    system = cosines + ops.diag(1 - present) + 1e-5 * ops.eye(count)
    solution = ops.matmul(ops.inv(system), present[:, None])[:, 0] / safe * present
    total = ops.sum(solution)
    total = ops.where(ops.abs(total) < 1e-6, 1.0, total)
    return _count(gramian) * solution / total


def mean_cosine(gramian: Any) -> tuple[Any, Any]:
    """Returns the mean cosine over all pairs of nonzero gradients, and the number of pairs."""
    present = _present(gramian)
    lengths = ops.sqrt(ops.where(present > 0, ops.diagonal(gramian), 1.0))
    cosines = gramian / (lengths[:, None] * lengths[None, :])
    pairs = ops.triu(present[:, None] * present[None, :], k=1)
    count = ops.sum(pairs)
    return ops.sum(cosines * pairs) / ops.maximum(count, 1), count


def _present(gramian: Any) -> Any:
    """Returns 1 for each task that has a gradient, else 0."""
    return ops.cast(ops.diagonal(gramian) > 0, "float32")


def _count(gramian: Any) -> Any:
    return ops.maximum(ops.sum(_present(gramian)), 1)


def _normalised(gramian: Any) -> Any:
    """Scales a Gramian so that its gradients have a mean square of 1."""
    trace = ops.sum(ops.diagonal(gramian))
    return gramian * _count(gramian) / ops.where(trace > 0, trace, 1.0)


def _square(gramian: Any, weights: Any) -> Any:
    return ops.maximum(ops.sum(weights * ops.matmul(gramian, weights[:, None])[:, 0]), 0)


def _minimise_on_simplex(gramian: Any, linear: Any, factor: Any) -> Any:
    """Minimises linear . w + factor |sum of w_i g_i| over weights w of 0 or more that sum to 1.

    Uses projected gradient steps with momentum; the momentum restarts if it points uphill. Each
    step minimises a parabola above the length, so its size adapts to the length itself.
    """
    present = _present(gramian)
    # The largest row sum is an upper bound of the largest eigenvalue.
    largest = ops.maximum(ops.max(ops.sum(ops.abs(gramian), axis=1)), _TINY)

    def moves(_: Any, __: Any, ___: Any, moved: Any) -> Any:
        return moved > _STILL

    def step(weights: Any, ahead: Any, momentum: Any, _: Any) -> Any:
        pulled = ops.matmul(gramian, ahead[:, None])[:, 0]
        length = ops.maximum(ops.sqrt(ops.maximum(ops.sum(ahead * pulled), 0)), 1e-6)
        slope = linear + factor * pulled / length
        size = length / (ops.maximum(factor, 1e-6) * largest)
        new = _on_simplex(ahead - size * slope, present)
        following = (1 + ops.sqrt(1 + 4 * momentum**2)) / 2
        uphill = ops.sum((ahead - new) * (new - weights)) > 0
        following = ops.where(uphill, 1.0, following)
        share = ops.where(uphill, 0.0, (momentum - 1) / following)
        moved = ops.max(ops.abs(new - ahead))
        return new, _on_simplex(new + share * (new - weights), present), following, moved

    start = present / _count(gramian)
    state = (start, start, ops.ones(()), ops.ones(()))
    return ops.while_loop(moves, step, state, maximum_iterations=_ITERATIONS)[0]


def _on_simplex(point: Any, present: Any) -> Any:
    """Returns the nearest weights of 0 or more that sum to 1, 0 for tasks that are absent."""
    point = ops.where(present > 0, point, -1e9)
    falling = -ops.sort(-point)
    excess = (ops.cumsum(falling) - 1) / ops.arange(1, point.shape[0] + 1, dtype="float32")
    last = ops.sum(ops.cast(falling > excess, "int32")) - 1
    return ops.maximum(point - ops.take(excess, ops.maximum(last, 0)), 0) * present
