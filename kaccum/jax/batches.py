"""Batches: how many examples they have, and how they are cut."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import keras

from kaccum import batches


def examples_in(batch: Any) -> list[int]:
    """The number of examples of a batch of `fit`, for each part of the devices.

    Args:
        batch: Nested arrays, with the examples along their first axis.

    Raises:
        ValueError: If they have not.
    """
    distribution = keras.distribution.distribution()
    # In so many parts the devices have it.
    parts = 1 if distribution is None else distribution.num_model_replicas
    return [batches.examples_in(batch) // parts] * parts


def cut(
    batch: Any, sizes: list[list[int]], model: keras.Model
) -> Iterator[Any]:
    """The micro-batches of a batch, one after the other.

    Args:
        batch: As in `examples_in`.
        sizes: How many examples each of them has, for each part of the devices.
        model: What trains on them.
    """
    if len(sizes) == 1:
        yield batch
        return
    start = 0
    for each in sizes:
        yield _part_of(batch, start, each[0], len(each))
        start += each[0]


def _part_of(batch: Any, start: int, size: int, parts: int) -> Any:
    leaves = keras.tree.flatten(batch)
    if all(leaf is None or isinstance(leaf, jax.Array) for leaf in leaves):
        return _compiled_part_of(batch, start, size, parts)
    return batches.part_of(batch, start, start + size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compiled_part_of(batch: Any, start: Any, size: int, parts: int) -> Any:
    """Some examples of those that each part of the devices has."""

    def part_of(array: Any) -> Any:
        if parts == 1:
            return jax.lax.dynamic_slice_in_dim(array, start, size)
        shape = array.shape[1:]
        array = array.reshape(parts, -1, *shape)
        array = jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
        array = array.reshape(parts * size, *shape)
        layout = keras.distribution.distribution().get_data_layout(array.shape)
        return jax.lax.with_sharding_constraint(array, layout.backend_layout)

    return jax.tree.map(part_of, batch)
