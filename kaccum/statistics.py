"""Moving statistics of `BatchNormalization`, which advance once an update.

Keeps the mean and variance of a window, pooled over its micro-batches, and
moves the layers' averages at its end as the large batch would.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from kaccum.backend import engine
from kaccum.keras_private import (
    is_inside_plain_normalization,
    moments_of_batch,
)
from kaccum.patches import SharedPatch

_hearing = threading.local()


def _compute_and_tell(layer: Any, inputs: Any, mask: Any) -> Any:
    mean, variance = moments_of_batch(layer, inputs, mask)
    hear = getattr(_hearing, "hear", None)
    if hear is not None and is_inside_plain_normalization():
        hear(layer, mean, variance, _size(layer, inputs, mask))
    return mean, variance


#: A context in which the moments of batches are told to who hears them.
telling = SharedPatch(
    keras.layers.BatchNormalization, "_moments", _compute_and_tell
)


@contextlib.contextmanager
def heard_by(hear: Callable[..., None]) -> Iterator[None]:
    """Calls `hear` with each layer that this thread normalises a batch with.

    And with the batch's mean, its variance, and of how many elements they are.
    """
    previous = getattr(_hearing, "hear", None)
    _hearing.hear = hear
    try:
        yield
    finally:
        _hearing.hear = previous


def _size(layer: Any, inputs: Any, mask: Any) -> Any:
    """How many elements the mean of a feature is of, a scalar."""
    shape = ops.shape(inputs)
    axis = layer.axis % len(shape)
    # A number, where the shape is known.
    size = math.prod(each for i, each in enumerate(shape) if i != axis)
    size = ops.cast(size, "float32")
    if mask is None:
        return size
    return size * ops.mean(ops.cast(mask, "float32"))


class Pool:
    """Mean and variance of what a layer saw in the open window.

    In variables that are taken back where a step is. Each replica has its
    own. Added up after Chan, Golub, LeVeque (1979), "Updating
    formulae and a pairwise algorithm for computing sample variances": means
    much larger than deviations lose nothing.

    Args:
        layer: The `BatchNormalization`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        shape = layer.moving_mean.shape
        # Keras computes in float32, too, and rounds when it assigns.
        dtype = keras.backend.result_type(layer.moving_mean.dtype, "float32")
        self._variables = [
            engine().new_variable(each, dtype, name)
            for name, each in (
                ("calls", ()),
                ("size", ()),
                ("mean", shape),
                ("variance", shape),
            )
        ]

    @property
    def parts(self) -> list[Any]:
        """What each replica has, a row each: the others' are zeros."""
        return [engine().as_row(v) for v in self._variables]

    def update(self, mean: Any, variance: Any, size: Any) -> None:
        """Counts the moments of a micro-batch.

        Args:
            mean: Of the layer's features, of shape `(features,)`.
            variance: The same shape.
            size: Scalar, the number of elements that they are of.
        """
        before = [ops.convert_to_tensor(v) for v in self._variables]
        new = [
            ops.cast(each, before[0].dtype)
            for each in (1, size, mean, variance)
        ]
        pooled = _pooled(before, new)
        for variable, value in zip(self._variables, pooled):
            variable.assign(value)

    def close(self, parts: list[Any]) -> None:
        """Moves the layer's averages, if it was called in the window.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        rows = zip(*(engine().rows_of(part) for part in parts))
        calls, _, mean, variance = functools.reduce(_pooled, map(list, rows))
        momentum = self._layer.momentum
        for variable, value in (
            (self._layer.moving_mean, mean),
            (self._layer.moving_variance, variance),
        ):
            old = ops.cast(variable, value.dtype)
            new = old * momentum + value * (1.0 - momentum)
            variable.assign(ops.where(ops.greater(calls, 0), new, old))

    def reset(self) -> None:
        """Starts an empty window."""
        for variable in self._variables:
            variable.assign(ops.zeros(variable.shape, variable.dtype))


def warn_about(layer: Any) -> None:
    """Says that a layer moves its averages by itself."""
    warnings.warn(
        "The moving statistics of a layer must be those that "
        "`BatchNormalization.call` computes to advance once an update. "
        f"Received: {layer.name!r} ({type(layer).__name__}), which moves its "
        "own. They advance once a micro-batch.",
        stacklevel=2,
    )


def _pooled(first: list[Any], second: list[Any]) -> list[Any]:
    """Calls, size, mean and variance of two sets of elements together."""
    calls, size, mean, variance = first
    more_calls, more, other_mean, other_variance = second
    share = ops.divide_no_nan(more, size + more)
    gap = other_mean - mean
    within = variance + (other_variance - variance) * share
    return [
        calls + more_calls,
        size + more,
        mean + gap * share,
        within + ops.square(gap) * share * (1.0 - share),
    ]


class WindowStatistics:
    """What the layers of a model saw in the open window."""

    def __init__(self) -> None:
        # By layer and call: Keras moves the averages once for each call.
        self._pools: dict[tuple[int, int], Pool] = {}

    def __len__(self) -> int:
        return len(self._pools)

    def update(
        self, layer: Any, mean: Any, variance: Any, size: Any, *, call: int
    ) -> None:
        """Counts the moments of a micro-batch.

        Args:
            layer: The `BatchNormalization`.
            mean: Its batch's mean, of shape `(features,)`.
            variance: Its batch's variance, of the same shape.
            size: Scalar, the number of elements that they are of.
            call: Tells apart several calls of the layer in one step.
        """
        key = (id(layer), call)
        if key not in self._pools:
            make = functools.partial(Pool, layer)
            self._pools[key] = engine().outside_of_traces(make)
        self._pools[key].update(mean, variance, size)

    @property
    def parts(self) -> list[Any]:
        """What the replicas of a strategy have to add up for an update."""
        return [part for pool in self._pools.values() for part in pool.parts]

    def close(self, parts: list[Any]) -> None:
        """Ends the window.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        for i, pool in enumerate(self._pools.values()):
            pool.close(parts[4 * i : 4 * i + 4])
        self.reset()

    def reset(self) -> None:
        """Starts an empty window."""
        for pool in self._pools.values():
            pool.reset()
