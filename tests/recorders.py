"""Callbacks that look at a fit, or end it."""

import keras
import numpy as np

from tests.backends import BACKEND


def is_equal(a, b):
    """Whether lists of arrays are the same, bit for bit."""
    return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))


def local_values(variable):
    """What each replica holds of a variable, as arrays."""
    if BACKEND != "tensorflow":
        return [keras.ops.convert_to_numpy(variable)]
    value = getattr(variable, "value", variable)
    return [part.numpy() for part in getattr(value, "values", (value,))]


def state_of(model):
    """All that an update may change, on every replica, as arrays.

    The scale of a `LossScaleOptimizer` is not of it.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    variables = [*model.trainable_variables, *optimizer.variables]
    return [value for v in variables for value in local_values(v)]


class Recorder(keras.callbacks.Callback):
    """Keeps what a fit has come to.

    `batches` has the state after each batch, `epochs` and `validations` the
    number of updates at the end of each epoch and the start of its validation.
    """

    def __init__(self):
        super().__init__()
        self.batches, self.epochs, self.validations = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(state_of(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(int(self.model.optimizer.iterations.numpy()))

    def on_test_begin(self, logs=None):
        self.validations.append(int(self.model.optimizer.iterations.numpy()))


class Stop(keras.callbacks.Callback):
    """Ends a fit after a batch, or after a number of updates.

    Args:
        batch: After which batch of an epoch.
        error: What to raise; without one the training stops.
        updates: After how many updates instead.
    """

    def __init__(self, batch=None, error=None, *, updates=None):
        super().__init__()
        self.batch, self.error, self.updates = batch, error, updates

    def on_train_batch_end(self, batch, logs=None):
        if self.updates is not None:
            is_it = int(self.model.optimizer.iterations) == self.updates
        else:
            is_it = batch == self.batch
        if is_it and self.error is not None:
            raise self.error
        self.model.stop_training |= is_it
