"""Batches: how many examples they have, and how they are cut."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.arrays import common_length
from kaccum.backends.tensorflow.replicas import Replicas, local_values


class Batches(Replicas):
    """Batches of tensors, also ragged or sparse ones, or of each replica's."""

    def examples_in(self, batch: Any) -> list[int]:
        counts = []
        for part in _of_each_replica(batch):
            arrays = [
                leaf for leaf in keras.tree.flatten(part) if _is_array(leaf)
            ]
            lengths = {_length(array) for array in arrays}
            shapes = keras.tree.map_structure(_shape_or_type, part)
            counts.append(common_length(lengths, shapes))
        return counts

    def cut(
        self, batch: Any, sizes: list[list[int]], model: keras.Model
    ) -> Iterator[Any]:
        if len(sizes) == 1:
            yield batch
            return
        starts = [0] * len(sizes[0])
        for each in sizes:
            yield keras.tree.map_structure(
                lambda leaf: _part_of(leaf, starts, each, model),  # noqa: B023
                batch,
            )
            starts = [start + size for start, size in zip(starts, each)]

    def of_one_replica(self, batch: Any) -> Any:
        return _of_each_replica(batch)[0]

    def logits_of(self, tensor: Any) -> Any:
        # (Keras 3.0 to 3.15.)
        return getattr(tensor, "_keras_logits", None)

    def may_be_empty(self, data: Any) -> bool:
        if self.replicas() == 1:
            return False
        arrays = (leaf for leaf in keras.tree.flatten(data) if _is_array(leaf))
        return not any(_length(array) for array in arrays)


def without_optionals(data: Any) -> Any:
    """Data of a step: Keras stands an `Optional` for `None` in a data set."""
    return keras.tree.map_structure(
        lambda leaf: leaf if _is_array(leaf) else None, data
    )


def _of_each_replica(batch: Any) -> list[Any]:
    def of(replica: int) -> Any:
        return keras.tree.map_structure(
            lambda leaf: local_values(leaf)[replica], batch
        )

    leaves = keras.tree.flatten(batch)
    return [of(i) for i in range(len(local_values(leaves[0])))]


def _part_of(
    leaf: Any, starts: list[int], sizes: list[int], model: keras.Model
) -> Any:
    parts = [
        _slice(part, start, size)
        for part, start, size in zip(local_values(leaf), starts, sizes)
    ]
    if len(parts) == 1:
        return parts[0]
    strategy = model.distribute_strategy
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


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
    rest = len(leaf.shape) - 1
    # Where it is, else all of it would go to the device that computes.
    # (Arrays of NumPy 1 do not say that they are on the processor.)
    with tf.device(getattr(leaf, "device", "cpu")):
        # Python's slices take the host five times as long (TensorFlow 2.21).
        return tf.raw_ops.Slice(
            input=leaf,
            begin=_constant(start, *[0] * rest),
            size=_constant(size, *[-1] * rest),
        )


@functools.lru_cache(maxsize=1024)
def _constant(*numbers: int) -> tf.Tensor:
    with tf.device("CPU:0"):
        return tf.constant(numbers, tf.int64)


def _is_array(leaf: Any) -> bool:
    # Keras stands an `Optional` for `None`.
    return leaf is not None and not isinstance(leaf, tf.experimental.Optional)


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, tf.RaggedTensor):
        return int(leaf.nrows()) if tf.executing_eagerly() else None
    return leaf.shape[0] if len(leaf.shape) else None


def _shape_or_type(leaf: Any) -> Any:
    return tuple(leaf.shape) if _is_array(leaf) else None
