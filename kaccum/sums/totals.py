"""A few sums of the open window that are changed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from kaccum.backends import SumSpec, backend


class Totals:
    """Numbers or arrays of kaccum's own, which a micro-batch moves on at once.

    Each replica has its own.

    Args:
        shapes: The shape of each.
        dtype: The dtype of all.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> None:
        self._backend = backend()
        #: The sums.
        self.sums = self._backend.new_sums(
            [SumSpec(shape, dtype) for shape in shapes]
        )

    def parts(self) -> list[Any]:
        """What each replica has, a row each: the others' are zeros."""
        values = self._backend.values_of(self.sums)
        return [self._backend.as_row(value) for value in values]

    def empty(self) -> None:
        """Makes all of them zero."""
        self._backend.empty(self.sums)


def chosen(kept: Any, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """What is there after a micro-batch.

    Args:
        kept: Whether its window keeps it: `True`, or a scalar bool tensor.
        new: What it makes of `old`.
        old: What was there before.
    """
    if kept is True:
        return list(new)
    return [ops.where(kept, *pair) for pair in zip(new, old)]
