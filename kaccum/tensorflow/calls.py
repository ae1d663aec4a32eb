"""Calls of compiled functions that cost the host little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_DATASETS = (tf.data.Iterator, tf.distribute.DistributedIterator)


class CompiledCall:
    """A `tf.function` of one argument that is mostly called alike.

    TensorFlow works out the signature of every call, which takes it longer than
    small models take for a step (2.21). Here a call that is like the last one
    goes right to the function that was traced for that.

    Args:
        function: Function of nested tensors, or of an iterator of a data set.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._compiled = tf.function(
            self._call_packed, autograph=False, reduce_retracing=True
        )
        self._structure: Any = None
        self._signature: Any = None
        self._traced: Any = None
        # The iterator that it was last called with. Not a batch: it would take
        # memory.
        self._iterator: Any = None
        self._tensors: list[Any] = []

    def __call__(self, argument: Any) -> Any:
        """What the function returns."""
        if argument is not None and argument is self._iterator:
            return self._traced(self._tensors)
        tensors = tf.nest.flatten(argument, expand_composites=True)
        signature = [_signature_of(tensor) for tensor in tensors]
        if signature != self._signature or not self._is_alike(argument):
            self._structure = tf.nest.map_structure(_spec_of, argument)
            self._traced = self._compiled.get_concrete_function(tensors)
            self._signature = signature
        if is_dataset(argument):
            self._iterator, self._tensors = argument, tensors
        return self._traced(tensors)

    def forget(self) -> None:
        """Lets go of the iterator."""
        self._iterator, self._tensors = None, []

    def _is_alike(self, argument: Any) -> bool:
        try:
            tf.nest.assert_same_structure(
                self._structure, argument, expand_composites=True
            )
        except (TypeError, ValueError):
            return False
        return True

    def _call_packed(self, tensors: list[Any]) -> Any:
        return self._function(
            tf.nest.pack_sequence_as(
                self._structure, tensors, expand_composites=True
            )
        )


def is_dataset(source: Any) -> bool:
    """Whether `source` is an iterator that a compiled function can pull."""
    return isinstance(source, _DATASETS)


def _signature_of(tensor: Any) -> Any:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _spec_of(value: Any) -> Any:
    return None if value is None else tf.type_spec_from_value(value)
