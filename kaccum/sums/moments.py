"""Moving statistics of `BatchNormalization`, which advance once an update."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import keras
from keras import ops

from kaccum.sums.totals import Totals, chosen


class LayerMoments(NamedTuple):
    """What a `BatchNormalization` normalised a micro-batch with.

    Args:
        layer: The layer.
        call: Tells apart several calls of the layer in one step.
        mean: Of its features, of shape `(features,)`.
        variance: The same shape.
        size: Scalar, the number of elements that they are of.
    """

    layer: Any
    call: int
    mean: Any
    variance: Any
    size: Any


class Moments(Totals):
    """Mean and variance of what a layer saw in the open window.

    Holds the number of calls, the number of elements (scalars), their mean and
    their variance (of the shape of the layer's statistics, in their dtype, at
    least float32). They are pooled after Chan, Golub, LeVeque (1979), "Updating
    formulae and a pairwise algorithm for computing sample variances": means
    much larger than deviations lose nothing.

    Args:
        layer: The `BatchNormalization`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        shape = tuple(layer.moving_mean.shape)
        # Keras computes in float32, too, and rounds when it assigns.
        self._dtype = keras.backend.result_type(
            layer.moving_mean.dtype, "float32"
        )
        super().__init__([(), (), shape, shape], self._dtype)

    def add(self, moments: LayerMoments, kept: Any) -> None:
        """Counts the moments of a micro-batch.

        Args:
            moments: The moments.
            kept: `True`, or a scalar bool: whether the window keeps them.
        """
        _, _, mean, variance, size = moments
        new = [ops.cast(x, self._dtype) for x in (1, size, mean, variance)]
        old = self._backend.values_of(self.sums)
        pooled = chosen(kept, _pooled(old, new), old)
        self._backend.assign(self.sums, pooled)

    def close(self, parts: list[Any]) -> None:
        """Moves the layer's averages, if it was called in the window.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        rows = zip(*(self._backend.rows_of(part) for part in parts))
        calls, _, mean, variance = functools.reduce(_pooled, map(list, rows))
        momentum = self._layer.momentum
        for variable, value in (
            (self._layer.moving_mean, mean),
            (self._layer.moving_variance, variance),
        ):
            old = ops.cast(variable, value.dtype)
            new = old * momentum + value * (1.0 - momentum)
            variable.assign(ops.where(ops.greater(calls, 0), new, old))


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
