"""Yogi, the server optimizer of FedYogi, which Keras does not have."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class Yogi(keras.optimizers.Optimizer):
    """Adam whose second moment moves by `(1 - beta_2) * g**2` towards `g**2`.

    The server optimizer of Reddi et al., 2021, Adaptive Federated Optimization (arXiv:2003.00295,
    Algorithm 2), without bias correction. Yogi is from Zaheer et al., 2018, Adaptive Methods for
    Nonconvex Optimization.

    Args:
        learning_rate: the learning rate or a schedule. Defaults to 1e-2.
        beta_1: decay of the first moment. Defaults to 0.9.
        beta_2: decay of the second moment. Defaults to 0.99.
        epsilon: constant added to the square root of the second moment. The initial second moment
            is its square. Defaults to 1e-3.
        **kwargs: arguments of `keras.optimizers.Optimizer`.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        epsilon: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates the two moments of each variable."""
        if self.built:
            return
        super().build(variables)
        start = keras.initializers.Constant(self.epsilon**2)
        self._first, self._second = self.add_optimizer_variables(
            variables, ["first", "second"], initializer=["zeros", start]
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates a variable."""
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        index = self._get_variable_index(variable)
        first, second = self._first[index], self._second[index]
        square = ops.square(gradient)
        self.assign(first, self.beta_1 * first + (1 - self.beta_1) * gradient)
        self.assign(second, second - (1 - self.beta_2) * square * ops.sign(second - square))
        self.assign_sub(variable, rate * first / (ops.sqrt(second) + self.epsilon))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        own = {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}
        return {**super().get_config(), **own}
