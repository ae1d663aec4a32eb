"""Nested arrays: how many examples they have, and parts of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src.backend.common import masking


def examples_in(batch: Any) -> int:
    """The number of examples of a batch of `fit`.

    Args:
        batch: Nested arrays, or `None`s. Each array has the examples along its
            first axis.

    Raises:
        ValueError: If they have not.
    """
    shapes = keras.tree.map_structure(
        lambda array: None if array is None else tuple(array.shape), batch
    )
    lengths = {
        array.shape[0] if len(array.shape) else None
        for array in keras.tree.flatten(batch)
        if array is not None
    }
    return common_length(lengths, shapes)


def part_of(batch: Any, start: int, end: int) -> Any:
    """The examples `start` to `end` (left out) of a batch of arrays.

    Args:
        batch: As in `examples_in`.
        start: The first example.
        end: The one after the last.
    """
    return keras.tree.map_structure(
        lambda array: None if array is None else array[start:end], batch
    )


class Equal(NamedTuple):
    """Parts of a batch that follow each other and are of one size.

    Args:
        start: The first example, of each replica.
        size: How many examples each part has, of each replica.
        times: How many parts there are.
        replicas: How many replicas there are.
    """

    start: int
    size: int
    times: int
    replicas: int


def equal_parts(sizes: list[list[int]]) -> list[Equal]:
    """The parts of a batch, those of one size together.

    Args:
        sizes: As of `Backend.cut`, each the same for all replicas.
    """
    found, start = [], 0
    for (size, replicas), alike in itertools.groupby(
        (each[0], len(each)) for each in sizes
    ):
        times = len(list(alike))
        found.append(Equal(start, size, times, replicas))
        start += times * size
    return found


def joined(batches: Sequence[Any]) -> Any:
    """The examples of several batches, as one batch."""
    if len(batches) == 1:
        return batches[0]
    return keras.tree.map_structure(
        lambda *arrays: None if arrays[0] is None else ops.concatenate(arrays),
        *batches,
    )


def masks_of(tensors: Any) -> list[Any]:
    """Keras's masks of nested tensors, `None` for one without."""
    leaves = keras.tree.flatten(tensors)
    return [masking.get_keras_mask(leaf) for leaf in leaves]


def with_masks(tensors: Any, masks: Sequence[Any]) -> Any:
    """Nested tensors that have these masks of Keras, `None` for none."""
    for leaf, mask in zip(keras.tree.flatten(tensors), masks):
        masking.set_keras_mask(leaf, mask)
    return tensors


def with_logits(tensors: Any, logits: Sequence[Any]) -> Any:
    """Nested tensors that have these logits, as `Backend.logits_of` says."""
    for leaf, each in zip(keras.tree.flatten(tensors), logits):
        if each is not None:
            leaf._keras_logits = each
    return tensors


def common_length(lengths: set[int | None], shapes: Any) -> int:
    """The one length that all arrays of a batch have.

    Args:
        lengths: Those of all arrays, `None` for one without axes.
        shapes: All shapes, for the message.

    Raises:
        ValueError: If they differ.
    """
    length = lengths.copy().pop() if len(lengths) == 1 else None
    if length is None:
        advice = ""
        if None in lengths:
            advice = " Of a data set that is not batched pass `.batch(size)`."
        raise ValueError(
            "All arrays of a batch must have the same examples along their "
            "first axis to be cut into micro-batches. Received: a batch of "
            f"shapes {shapes}.{advice}"
        )
    return length
