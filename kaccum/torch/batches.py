"""Batches: how many examples they have, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from kaccum import batches


def examples_in(batch: Any) -> list[int]:
    """The number of examples of a batch of `fit`, in a list.

    Args:
        batch: Nested tensors, with the examples along their first axis.

    Raises:
        ValueError: If they have not.
    """
    return [batches.examples_in(batch)]


def cut(
    batch: Any, sizes: list[list[int]], model: keras.Model
) -> Iterator[Any]:
    """The micro-batches of a batch, one after the other.

    Args:
        batch: As in `examples_in`.
        sizes: How many examples each of them has, in a list.
        model: What trains on them.
    """
    start = 0
    for (size,) in sizes:
        yield batches.part_of(batch, start, start + size)
        start += size
