"""Whether one weight is right for several losses that have denominators."""

from __future__ import annotations

from typing import Any

from keras import ops

from kaccum.backends import SumSpec
from kaccum.sums.totals import Totals, chosen


class Proportions(Totals):
    """The denominators of a window's first micro-batch, and how others differ.

    A weight for each loss would be right for each; one for all of them is, if
    the denominators of the micro-batches of a window are in proportion.

    Args:
        count: How many losses there are.
    """

    def __init__(self, count: int) -> None:
        super().__init__([()] * count, "float32")
        #: How far they were off, at most; `empty` leaves it.
        self.kept = self._backend.new_sums([SumSpec((), "float32")])

    def add(self, denominators: list[Any], kept: Any) -> None:
        """Compares those of a micro-batch.

        Args:
            denominators: Scalars, zero for a mean of nothing.
            kept: `True`, or a scalar bool: whether the window keeps it.
        """
        first = self._backend.values_of(self.sums)
        is_first = ops.equal(sum(first), 0.0)
        new = [ops.where(is_first, d, f) for d, f in zip(denominators, first)]
        (largest,) = self._backend.values_of(self.kept)
        off = largest
        for own, old in zip(denominators[1:], new[1:]):
            pair = own * new[0], old * denominators[0]
            total = pair[0] + pair[1]
            part = ops.divide_no_nan(ops.abs(pair[0] - pair[1]), total)
            off = ops.maximum(off, part)
        self._backend.assign(self.sums, chosen(kept, new, first))
        self._backend.assign(self.kept, chosen(kept, [off], [largest]))

    def close(self, parts: list[Any]) -> None:
        """Compares the first micro-batches of the replicas.

        Args:
            parts: `parts`, each summed over all replicas.
        """
        rows = zip(*(self._backend.rows_of(part) for part in parts))
        for row in rows:
            self.add(list(row), True)

    @property
    def largest(self) -> float:
        """How far proportions were off, at most: 0 for not at all, up to 1."""
        return float(self._backend.values_of(self.kept)[0])
