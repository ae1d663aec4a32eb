"""Batches: how many examples they have, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


def examples_in(batch: Any) -> int:
    """The number of examples in a batch of `fit`.

    Args:
        batch: Nested tensors, also ragged or sparse ones. Each has the examples
            along its first axis.

    Raises:
        ValueError: If they have not.
    """
    arrays = [leaf for leaf in keras.tree.flatten(batch) if _is_array(leaf)]
    counts = {_length(array) for array in arrays}
    count = counts.pop() if len(counts) == 1 else None
    if count is None:
        shapes = keras.tree.map_structure(_shape_or_type, batch)
        raise ValueError(
            "All arrays of a batch must have the same examples along their "
            "first axis to be cut into micro-batches. Received: a batch of "
            f"shapes {shapes}."
        )
    return count


def cut(batch: Any, sizes: list[int]) -> Iterator[Any]:
    """The micro-batches of a batch, one after the other.

    Args:
        batch: As in `examples_in`.
        sizes: How many examples each of them has.
    """
    if len(sizes) == 1:
        yield batch
        return
    start = 0
    for size in sizes:
        yield keras.tree.map_structure(
            lambda leaf: _slice(leaf, start, size), batch  # noqa: B023
        )
        start += size


def _slice(leaf: Any, start: int, size: int) -> Any:
    if not _is_array(leaf):
        return leaf
    if isinstance(leaf, tf.RaggedTensor):
        return leaf[start : start + size]
    if isinstance(leaf, tf.SparseTensor):
        shape = leaf.dense_shape
        begin = tf.one_hot(0, len(leaf.shape), start, 0, dtype=tf.int64)
        shape = tf.tensor_scatter_nd_update(shape, [[0]], [size])
        return tf.sparse.slice(leaf, begin, shape)
    # Where it is, else all of it would go to the device that computes.
    with tf.device(leaf.device):
        return leaf[start : start + size]


def _is_array(leaf: Any) -> bool:
    # Keras stands an `Optional` for `None`.
    return leaf is not None and not isinstance(leaf, tf.experimental.Optional)


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, tf.RaggedTensor):
        return int(leaf.nrows())
    return leaf.shape[0] if len(leaf.shape) else None


def _shape_or_type(leaf: Any) -> Any:
    return tuple(leaf.shape) if _is_array(leaf) else None
