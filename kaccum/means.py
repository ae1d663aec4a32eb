"""Entries of the log that are means of one number a batch.

Keras keeps them in `Mean` metrics, which it gives the loss of each batch, that
of each output, and what a metric function returns if that is a scalar. In a
window the number is that of all its micro-batches.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from kaccum.backend import engine
from kaccum.patches import SharedPatch

#: Taken at import: Keras's own.
update_state = keras.metrics.Mean.update_state
_hearing = threading.local()


def _tell_or_update(metric: Any, values: Any, sample_weight: Any = None) -> Any:
    update = getattr(_hearing, "update", None)
    scalars = [v for v in (values, sample_weight) if v is not None]
    if update is None or any(len(getattr(v, "shape", ())) for v in scalars):
        return update_state(metric, values, sample_weight)
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

    def __len__(self) -> int:
        return len(self._means)

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
            make = functools.partial(
                _WindowMean, metric, weight is None, size is None
            )
            self._means[key] = engine().outside_of_traces(make)
        self._means[key].update(value, size, weight, once)

    @property
    def parts(self) -> list[Any]:
        """What the replicas of a strategy have to add up for an update."""
        return [part for mean in self._means.values() for part in mean.parts]

    def close(self, parts: list[Any]) -> None:
        """Ends the window.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        for i, mean in enumerate(self._means.values()):
            mean.close(*parts[3 * i : 3 * i + 3])
        self.reset()

    def reset(self) -> None:
        """Starts an empty window."""
        for mean in self._means.values():
            mean.reset()


class _WindowMean:
    """A number of the open window, kept up to date in a `Mean` metric.

    In variables that are taken back where a step is. Each replica has its own,
    as of the metric, and keeps its share of the window up to date from what it
    has seen itself; at the end it learns of the others.

    Args:
        metric: The `Mean`.
        adds_up: Whether the numbers of micro-batches add up.
        is_one: Whether the metric weights each batch by 1.
    """

    def __init__(self, metric: Any, adds_up: bool, is_one: bool) -> None:
        self._metric = metric
        self._adds_up = adds_up
        self._is_one = is_one
        self._variables = [
            engine().new_variable((), metric.dtype, name)
            for name in ("total", "weight", "size", "once")
        ]

    @property
    def parts(self) -> list[Any]:
        """Total, weight and size."""
        return self._values[:3]

    @property
    def _values(self) -> list[Any]:
        return [ops.convert_to_tensor(v) for v in self._variables]

    def update(self, value: Any, size: Any, weight: Any, once: Any) -> None:
        metric, dtype = self._metric, self._metric.dtype
        # After a reset of the metric what went before is not in it any more.
        old = self._values
        is_in = ops.cast(ops.greater_equal(metric.count, old[2]), dtype)
        old = [part * is_in for part in old]
        value = ops.stop_gradient(ops.cast(value, dtype))
        once = ops.stop_gradient(ops.cast(once, dtype))
        weight = ops.cast(1.0 if weight is None else weight, dtype)
        value = value - once if self._adds_up else weight * value
        size = ops.cast(1.0 if size is None else size, dtype)
        size = size if self._is_one else old[2] + size
        new = [old[0] + value, old[1] + weight, size, once]
        change = self._number(*new) * size - self._number(*old) * old[2]
        metric.total.assign_add(change)
        metric.count.assign_add(size - old[2])
        for variable, part in zip(self._variables, new):
            variable.assign(part)

    def close(self, total: Any, weight: Any, size: Any) -> None:
        """Corrects what the metric has by what all replicas saw."""
        if engine().replicas() == 1:
            return
        _, _, own, once = self._values
        # Of a window that counts once, each replica counts a share.
        share = own / ops.maximum(size, 1.0) if self._is_one else own
        number = self._number(total, weight, size, once)
        now = self._number(*self._values)
        self._metric.total.assign_add(number * share - now * own)
        self._metric.count.assign_add(share - own)

    def reset(self) -> None:
        for variable in self._variables:
            variable.assign(ops.zeros((), variable.dtype))

    def _number(self, total: Any, weight: Any, size: Any, once: Any) -> Any:
        if self._adds_up:
            return total + once
        return ops.divide_no_nan(total, weight)
