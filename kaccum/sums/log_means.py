"""Entries of the log that are means of one number a batch.

Keras keeps them in `Mean` metrics, which it gives the loss of each batch, that
of each output, and what a metric function returns if that is a scalar. In a
window the number is that of all its micro-batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from kaccum.sums.totals import Totals, chosen


class LogNumber(NamedTuple):
    """A scalar that a `Mean` metric was given.

    Args:
        metric: The `Mean`.
        call: Tells apart several numbers of one step for the metric.
        value: The number.
        size: Scalar that the metric weights it by, or `None` for 1 a batch.
        reductions: Of which reductions its weight is, `None` for the number of
            examples.
        has_regularizers: Whether they are part of it.
        undivided: The part of a mean that is a sum over the window.
    """

    metric: Any
    call: int
    value: Any
    size: Any
    reductions: slice | None
    has_regularizers: bool
    undivided: Any


class _Parts(NamedTuple):
    """What the window has of a number, as of `LogMean`."""

    total: Any
    weight: Any
    size: Any
    undivided: Any
    once: Any


class LogMean(Totals):
    """A number of the open window, kept up to date in a `Mean` metric.

    Holds its total, its weight, its size (what the metric weights it by), the
    part of a mean that is a sum, and the part of a sum that counts once:
    scalars of the metric's dtype. Each replica
    keeps its share of the metric up to date from what it has seen itself; at
    the end of a window it learns of the others.

    Args:
        number: The first one.
        is_sum: Whether the numbers of micro-batches add up.
    """

    def __init__(self, number: LogNumber, is_sum: bool) -> None:
        super().__init__([()] * 5, number.metric.dtype)
        self._metric = number.metric
        self._is_sum = is_sum
        self._is_one = number.size is None

    def add(self, number: LogNumber, weight: Any, once: Any, kept: Any) -> None:
        """Counts the number of a micro-batch.

        Args:
            number: The number.
            weight: Scalar, the micro-batch's weight for it, or `None` where
                numbers of micro-batches add up.
            once: Scalar, the part of it that then counts once a window.
            kept: `True`, or a scalar bool: whether the window keeps it.
        """
        metric, dtype = self._metric, self._metric.dtype
        old = self._window
        # After a reset of the metric what went before is not in it any more.
        is_in = ops.cast(ops.greater_equal(metric.count, old.size), dtype)
        old = _Parts(*(part * is_in for part in old))
        value, once = ops.cast(number.value, dtype), ops.cast(once, dtype)
        weight = ops.cast(1.0 if weight is None else weight, dtype)
        undivided = ops.cast(number.undivided, dtype)
        value = value - undivided
        value = value - once if self._is_sum else weight * value
        size = ops.cast(1.0 if number.size is None else number.size, dtype)
        size = size if self._is_one else old.size + size
        new = _Parts(
            old.total + value,
            old.weight + weight,
            size,
            old.undivided + undivided,
            once,
        )
        new = _Parts(*chosen(kept, new, old))
        before = self._number(old) * old.size
        metric.total.assign_add(self._number(new) * new.size - before)
        metric.count.assign_add(new.size - old.size)
        self._backend.assign(self.sums, new)

    def parts(self) -> list[Any]:
        """What the replicas of a strategy have to add up for an update."""
        return self._backend.values_of(self.sums[:4])

    def close(self, parts: list[Any]) -> None:
        """Corrects what the metric has by what all replicas saw.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        if self._backend.replicas() == 1:
            return
        own = self._window
        total, weight, size, undivided = parts
        of_all = _Parts(total, weight, size, undivided, own.once)
        # Of a window that counts once, each replica counts a share.
        share = own.size / ops.maximum(size, 1.0) if self._is_one else own.size
        change = self._number(of_all) * share - self._number(own) * own.size
        self._metric.total.assign_add(change)
        self._metric.count.assign_add(share - own.size)

    @property
    def _window(self) -> _Parts:
        return _Parts(*self._backend.values_of(self.sums))

    def _number(self, of: _Parts) -> Any:
        if self._is_sum:
            return of.total + of.once
        return ops.divide_no_nan(of.total, of.weight) + of.undivided
