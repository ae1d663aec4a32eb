"""Calls of compiled functions that cost the host little."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.tensorflow.batches import without_optionals

_DATASETS = (tf.data.Iterator, tf.distribute.DistributedIterator)


class CompiledCall:
    """A `tf.function` of one argument that is mostly called alike.

    TensorFlow works out the signature of every call, which takes it longer than
    small models take for a step (2.21). Here a call that is like the last one
    goes right to the function that was traced for that.

    Args:
        function: Function of nested tensors, or of an iterator of a data set.
        knows_sizes: Whether it is traced for batches of one size each.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, knows_sizes: bool = True
    ) -> None:
        self._function = function
        self._knows_sizes = knows_sizes
        # By the structure of the argument: functions of its tensors.
        self._by_structure: dict[str, Any] = {}
        self._of_others = _compiled(function)
        # Of the last call.
        self._structure: Any = None
        self._signature: Any = None
        self._traced: Callable[..., Any] = self._of_others
        # If that was of an iterator. A batch would take memory.
        self._iterator: Any = None
        self._tensors: list[Any] = []

    def __call__(self, argument: Any) -> Any:
        """What the function returns."""
        if argument is not None and argument is self._iterator:
            return self._traced(self._tensors)
        self.forget()
        parts = tf.nest.flatten(argument)
        signature = [_signature_of(part) for part in parts]
        if any(each is _UNKNOWN for each in signature):
            return self._of_others(argument)
        tensors = tf.nest.flatten(argument, expand_composites=True)
        if signature != self._signature or not self._is_alike(argument):
            structure = tf.nest.map_structure(_structure_of, argument)
            # It may raise what the function raises.
            self._traced = self._trace(structure, tensors)
            self._structure, self._signature = structure, signature
        if is_dataset(argument):
            self._iterator, self._tensors = argument, tensors
        return self._traced(tensors)

    def forget(self) -> None:
        """Lets go of the iterator."""
        self._iterator, self._tensors = None, []

    def _is_alike(self, argument: Any) -> bool:
        try:
            tf.nest.assert_same_structure(self._structure, argument)
        except (TypeError, ValueError):
            return False
        return True

    def _trace(self, structure: Any, tensors: list[Any]) -> Any:
        key = repr(structure)
        if key not in self._by_structure:

            def call_packed(tensors: list[Any]) -> Any:
                packed = tf.nest.pack_sequence_as(
                    structure, tensors, expand_composites=True
                )
                return self._function(packed)

            self._by_structure[key] = _compiled(call_packed)
        given = tensors
        if not self._knows_sizes:
            given = [_of_any_size(tensor) for tensor in tensors]
        return self._by_structure[key].get_concrete_function(given)


def on_replicas(
    model: keras.Model, function: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """A function of a batch that each replica runs on its part of it.

    It is compiled by XLA where the model is.
    """

    def run(data: Any) -> Any:
        compiled = function
        if model.jit_compile and not model.run_eagerly:
            compiled = tf.function(function, autograph=False, jit_compile=True)
        # Keras stands an `Optional` for `None` in a data set.
        data = without_optionals(data)
        return model.distribute_strategy.run(compiled, args=(data,))

    return run


def _of_any_size(tensor: tf.Tensor | None) -> tf.TensorSpec | None:
    if tensor is None:
        return None
    shape = tensor.shape
    first = [None] if len(shape) else []
    return tf.TensorSpec([*first, *shape[1:]], tensor.dtype)


def is_dataset(source: Any) -> bool:
    """Whether `source` is an iterator that a compiled function can pull."""
    return isinstance(source, _DATASETS)


def iterator_like(iterator: tf.data.Iterator, batches: list[Any]) -> Any:
    """An iterator of batches that is of the same type as another one."""
    spec = iterator.element_spec
    datasets = [
        # What is captured, unlike a constant of the graph, is not copied.
        tf.data.Dataset.from_tensors(0).map(
            lambda _, batch=batch: _as_of(spec, batch)
        )
        for batch in batches
    ]
    joined = functools.reduce(tf.data.Dataset.concatenate, datasets)
    return iter(joined)


def _as_of(spec: Any, batch: Any) -> Any:
    """A batch whose shapes are known as far as a spec says."""
    specs = tf.nest.flatten(spec, expand_composites=True)
    tensors = tf.nest.flatten(batch, expand_composites=True)
    less = [
        tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=each.shape)
        for tensor, each in zip(tensors, specs)
    ]
    return tf.nest.pack_sequence_as(spec, less, expand_composites=True)


def _compiled(function: Callable[..., Any]) -> Any:
    return tf.function(function, autograph=False, reduce_retracing=True)


_UNKNOWN = object()


def _signature_of(part: Any) -> Any:
    if part is None:
        return ()
    if isinstance(part, tf.Tensor):
        return part.dtype, part.shape
    return part.element_spec if is_dataset(part) else _UNKNOWN


def _structure_of(part: Any) -> Any:
    """A part, but for the dtype and shape of tensors."""
    if is_dataset(part):
        return tf.type_spec_from_value(part)
    return None if part is None else 0
