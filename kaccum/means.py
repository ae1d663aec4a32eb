"""Entries of the log that are means of one number a batch.

Keras keeps them in `Mean` metrics, which it gives the loss of each batch, that
of each output, and what a metric function returns if that is a scalar. In a
window the number is that of all its micro-batches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from kaccum.patches import SharedPatch

# Taken at import: Keras's own.
_update_state = keras.metrics.Mean.update_state
_hearing = threading.local()


def _tell_or_update(metric: Any, values: Any, sample_weight: Any = None) -> Any:
    update = getattr(_hearing, "update", None)
    scalars = [v for v in (values, sample_weight) if v is not None]
    if update is None or any(len(ops.shape(v)) for v in scalars):
        return _update_state(metric, values, sample_weight)
    return update(metric, values, sample_weight)


#: A context in which scalars that a `Mean` is given are told to who hears them.
telling = SharedPatch(keras.metrics.Mean, "update_state", _tell_or_update)


@contextlib.contextmanager
def heard_by(update: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Calls `update` instead of the `update_state` of this thread's `Mean`s."""
    previous = getattr(_hearing, "update", None)
    _hearing.update = update
    try:
        yield
    finally:
        _hearing.update = previous


class WindowMeans:
    """What the `Mean` metrics were given in the open window."""

    def __init__(self) -> None:
        self._means: dict[tuple[int, int], _WindowMean] = {}

    def update(
        self,
        metric: Any,
        value: Any,
        size: Any,
        *,
        call: int,
        weight: Any,
        once: Any,
    ) -> None:
        """Counts the number of a micro-batch.

        Args:
            metric: The `Mean`.
            value: Scalar, the number.
            size: Scalar that the metric weights it by, or `None` for 1 a batch.
            call: Tells apart several numbers of one step for the metric.
            weight: Scalar, the micro-batch's weight for this number, or `None`
                where numbers of micro-batches add up.
            once: Scalar, the part of `value` that then counts once a window.
        """
        key = (id(metric), call)
        if key not in self._means:
            self._means[key] = _WindowMean(metric)
        self._means[key].update(value, size, weight, once)

    def reset(self) -> None:
        """Starts an empty window."""
        for mean in self._means.values():
            mean.reset()


class _WindowMean:
    """A number of the open window, kept up to date in a `Mean` metric.

    In Keras variables, so that they are taken back where a step is.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._total, self._weight, self._size = (
            keras.Variable(
                "zeros", (), metric.dtype, trainable=False, name=name
            )
            for name in ("total", "weight", "size")
        )

    def update(self, value: Any, size: Any, weight: Any, once: Any) -> None:
        metric, dtype = self._metric, self._metric.dtype
        # After a reset of the metric what went before is not in it any more.
        is_in = ops.cast(ops.greater_equal(metric.count, self._size), dtype)
        old = [part * is_in for part in (self._total, self._weight, self._size)]
        value, once = ops.cast(value, dtype), ops.cast(once, dtype)
        adds_up = weight is None
        weight = ops.cast(1.0 if adds_up else weight, dtype)
        value = value - once if adds_up else weight * value
        total, weight = old[0] + value, old[1] + weight
        is_one = size is None
        size = ops.cast(1.0 if is_one else size, dtype)
        size = size if is_one else old[2] + size

        def part_of(total: Any, weight: Any, size: Any) -> Any:
            if adds_up:
                return (total + once) * size
            return ops.divide_no_nan(total, weight) * size

        change = part_of(total, weight, size) - part_of(*old)
        metric.total.assign_add(change)
        metric.count.assign_add(size - old[2])
        self._total.assign(total)
        self._weight.assign(weight)
        self._size.assign(size)

    def reset(self) -> None:
        for variable in (self._total, self._weight, self._size):
            variable.assign(0.0)
