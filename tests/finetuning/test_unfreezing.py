import keras
import numpy as np
import pytest

import keras_lp as lp

too_short = pytest.mark.filterwarnings("ignore:The lowest")  # too few epochs for all blocks


def model_of(mlp, **kwargs):
    keras.utils.set_random_seed(0)
    return lp.finetune_model(
        lp.transfer_model(mlp((6, 5)), 3, cache_features=False), **{"learning_rate": 0.1, **kwargs}
    )


class Record(keras.callbacks.Callback):
    """Copies the weights at the start of each epoch and at the end."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_begin(self, epoch, logs=None):
        self.weights.append([np.array(v) for v in self.model.trainable_variables])

    on_train_end = lambda self, logs=None: self.on_epoch_begin(0)  # noqa: E731

    def moved(self):
        """Whether each variable moved, a row an epoch."""
        return [
            [bool(np.any(a != b)) for a, b in zip(old, new, strict=True)]
            for old, new in zip(self.weights, self.weights[1:], strict=False)
        ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_blocks_join_from_the_top(optimizer, mlp, digits):
    x, y = digits[0], digits[1] % 3
    model, record = model_of(mlp, optimizer=optimizer), Record()
    model.fit(x, y, epochs=4, verbose=0, callbacks=[lp.GradualUnfreezing(), record])
    low, middle, head = (slice(i, i + 2) for i in (0, 2, 4))
    moved = record.moved()
    for epoch, joined in enumerate([(head,), (head, middle), (head, middle, low)]):
        for part in (low, middle, head):
            assert all(moved[epoch][part]) if part in joined else not any(moved[epoch][part])
    assert all(moved[3])


def test_several_blocks_may_join_at_an_epoch(mlp, digits):
    model, record = model_of(mlp), Record()
    model.fit(
        digits[0], digits[1] % 3, epochs=2, verbose=0,
        callbacks=[lp.GradualUnfreezing(epochs_per_block=0.5), record],
    )  # fmt: skip
    first, second = record.moved()
    assert first == [False] * 4 + [True] * 2  # the head
    assert all(second)


def test_blocks_whose_turn_never_comes_are_named(mlp, digits):
    x, y = digits[0][:32], digits[1][:32] % 3
    model = model_of(mlp)
    with pytest.warns(UserWarning, match="lowest 1 of 2 blocks.*Train for 3 epochs"):
        model.fit(x, y, epochs=2, verbose=0, callbacks=[lp.GradualUnfreezing()])
    model.fit(x, y, epochs=3, verbose=0, callbacks=[lp.GradualUnfreezing()])  # warns of nothing


def test_the_same_compile_and_the_same_state_throughout(mlp, digits):
    model = model_of(mlp)
    optimizer, function = model.optimizer, []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            function.append((self.model.train_function, int(self.model.optimizer.iterations)))

    model.fit(
        digits[0], digits[1] % 3, batch_size=100, epochs=5, verbose=0,
        callbacks=[lp.GradualUnfreezing(epochs_per_block=2), Look()],
    )  # fmt: skip
    assert model.optimizer is optimizer
    assert len({id(one) for one, _ in function}) == 1
    assert [count for _, count in function] == [2, 4, 6, 8, 10]


@too_short
def test_what_waits_does_not_count_in_the_clip_norm(mlp, digits):
    """A step of SGD from the same weights, compared with a model whose blocks are truly frozen."""
    x, y = digits[0][:32], digits[1][:32] % 3
    moved = []
    for waits in (True, False):
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.01)
        trainable = "all" if waits else "head"
        model, record = model_of(mlp, optimizer=optimizer, trainable=trainable), Record()
        callbacks = [lp.GradualUnfreezing()] if waits else []
        model.fit(x, y, batch_size=32, epochs=1, verbose=0, callbacks=[*callbacks, record])
        before, after = (weights[-2:] for weights in record.weights)
        moved.append([b - a for a, b in zip(before, after, strict=True)])
    for ours, frozen in zip(*moved, strict=True):
        np.testing.assert_allclose(ours, frozen, rtol=1e-4, atol=1e-8)
    norm = np.sqrt(sum(np.sum(m**2) for m in moved[0]))
    assert norm == pytest.approx(0.01, rel=1e-4)


@too_short
def test_the_first_step_of_a_block_that_joins_is_no_larger_than_others(mlp, digits):
    """Adam with moments from 0 would take one three times as large."""
    model = model_of(mlp, optimizer=keras.optimizers.Adam(1e-3), layer_decay=1.0)
    steps = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before = np.array(self.model.trainable_variables[2])

        def on_train_batch_end(self, batch, logs=None):
            steps.append(np.abs(np.array(self.model.trainable_variables[2]) - self.before).max())

    model.fit(digits[0], digits[1] % 3, batch_size=20, epochs=2, verbose=0,
              callbacks=[lp.GradualUnfreezing(), Look()])  # fmt: skip
    assert max(steps[:10]) == 0
    assert 0 < steps[10] < 1.5e-3


@too_short
def test_afterwards_everything_moves(mlp, digits):
    model = model_of(mlp)
    model.fit(digits[0], digits[1] % 3, epochs=1, verbose=0, callbacks=[lp.GradualUnfreezing()])
    record = Record()
    model.fit(digits[0], digits[1] % 3, epochs=1, verbose=0, callbacks=[record])
    assert all(record.moved()[0])


def test_wrong_use_is_refused(mlp, digits):
    with pytest.raises(ValueError, match="epochs_per_block=0"):
        lp.GradualUnfreezing(0)
    model = lp.transfer_model(mlp(), 10)
    with pytest.raises(ValueError, match=r"optimizer Adam.*finetune_model"):
        model.fit(*digits, verbose=0, callbacks=[lp.GradualUnfreezing()])
