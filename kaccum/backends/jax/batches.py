"""What a train function of JAX is called with: batches, or stacks of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import keras
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from keras.src.trainers.data_adapters import data_adapter_utils

# What `fit` makes of batches that it could not stack, from Keras 3.16 on; there
# with `steps_per_execution` it stacks as many, along a first axis.
_Unstacked: Any = getattr(data_adapter_utils, "PartialBatchList", None)

#: Bytes of a batch that are not copied to a device for the sake of a call.
LARGE = 2**24


class Batches:
    """The batches of one call of a train function, or test function.

    Args:
        iterator: What Keras calls it with.
        may_stack: Whether `fit` or `evaluate` calls it, with
            `steps_per_execution`.
    """

    def __init__(self, iterator: Iterator[Any], may_stack: bool) -> None:
        self._iterator = iterator
        # Whether Keras's train function takes batches for stacks.
        self._may_stack = may_stack and _Unstacked is not None
        self._left: Iterator[Any] | None = None
        #: Batches that were stacked, if none of them was pulled by itself.
        self.stack: Any = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        self.pull()
        batch = next(self._iterator if self._left is None else self._left)
        self.stack = None
        return batch

    def pull(self) -> None:
        """Pulls what there is for the call, if it may be a stack.

        Raises:
            StopIteration: If there is nothing.
        """
        if self._left is not None or not self._may_stack:
            return
        pulled = next(self._iterator)
        if isinstance(pulled, _Unstacked):
            self._left = iter(pulled)
            return
        self.stack = pulled
        self._left = (batch_of(pulled, i) for i in range(length_of(pulled)))

    def peek(self, count: int) -> list[Any]:
        """The next batches, so many at most, which are still to come.

        Raises:
            StopIteration: If there are none.
        """
        self.pull()
        stack = self.stack
        pulled = list(itertools.islice(self, count))
        if not pulled:
            raise StopIteration
        following = self._iterator if self._left is None else self._left
        self._left = itertools.chain(pulled, following)
        self.stack = stack
        return pulled

    def single(self, batch: Any) -> Any:
        """What Keras's train function gets of a single batch."""
        return _Unstacked([batch]) if self._may_stack else batch


def length_of(stack: Any) -> int:
    """How many batches a stack has."""
    return int(jax.tree.leaves(stack)[0].shape[0])


def batch_of(stack: Any, index: Any) -> Any:
    """A batch of a stack: of its place, an int or a scalar."""
    return jax.tree.map(lambda x: x[index], stack)


def part_of(batch: Any, start: Any, size: int, parts: int) -> Any:
    """Some examples of those that each part of the devices has.

    Args:
        batch: Nested arrays in a trace.
        start: The first of them.
        size: How many they are.
        parts: In how many parts the devices have the batch.
    """

    def part_of_array(array: Any) -> Any:
        if parts == 1:
            return jax.lax.dynamic_slice_in_dim(array, start, size)
        shape = array.shape[1:]
        array = array.reshape(parts, -1, *shape)
        array = jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
        array = array.reshape(parts * size, *shape)
        layout = keras.distribution.distribution().get_data_layout(array.shape)
        return jax.lax.with_sharding_constraint(array, layout.backend_layout)

    return jax.tree.map(part_of_array, batch)


def is_on_devices(batch: Any) -> bool:
    """Whether all of a batch is in arrays of JAX."""
    leaves = keras.tree.flatten(batch)
    return all(leaf is None or isinstance(leaf, jax.Array) for leaf in leaves)


def can_be_given_whole(batch: Any) -> bool:
    """Whether a compiled function can get all of a batch, to cut it.

    What is on the host would be copied to the device: not if it is large.
    """
    leaves = [leaf for leaf in keras.tree.flatten(batch) if leaf is not None]
    on_host = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    on_devices = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    is_small = sum(leaf.nbytes for leaf in on_host) <= LARGE
    return is_small and len(on_host) + len(on_devices) == len(leaves)


def uses_convolutions(traced: Jaxpr | ClosedJaxpr) -> bool:
    """Whether what was traced computes some."""
    for equation in traced.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        inner = (
            each
            for each in jax.tree.leaves(equation.params)
            if isinstance(each, (Jaxpr, ClosedJaxpr))
        )
        if any(uses_convolutions(each) for each in inner):
            return True
    return False
