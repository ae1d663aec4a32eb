"""A few sums of the open window that are changed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from kaccum.backends import backend


class Totals:
    """Numbers or arrays of kaccum's own, which a micro-batch moves on at once.

    Each replica has its own.

    Args:
        shapes: The shape of each.
        dtype: The dtype of all.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str) -> None:
        #: The sums.
        self.sums = [backend().new_sum(shape, dtype) for shape in shapes]

    @property
    def values(self) -> list[Any]:
        """What they hold now."""
        return [backend().value_of(total) for total in self.sums]

    def become(self, new: Sequence[Any], kept: Any) -> None:
        """Moves on to other values, if the micro-batch is kept."""
        for total, value, old in zip(self.sums, new, self.values):
            backend().assign(total, chosen(kept, value, old))

    def empty(self) -> None:
        """Makes all of them zero."""
        for total in self.sums:
            backend().empty(total)


def chosen(kept: Any, new: Any, old: Any) -> Any:
    """What is there after a micro-batch.

    Args:
        kept: Whether its window keeps it: `True`, or a scalar bool tensor.
        new: What it makes of `old`.
        old: What was there before.
    """
    return new if kept is True else ops.where(kept, new, old)
