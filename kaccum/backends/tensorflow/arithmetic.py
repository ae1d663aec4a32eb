"""Arithmetic on sums and gradients, and where it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from kaccum.backends.base import SumSpec
from kaccum.backends.tensorflow.replicas import (
    Replicas,
    handles,
    in_a_thread,
)


class Arithmetic(Replicas):
    """Sums are variables, which graphs assign."""

    def new_sums(self, specs: Sequence[SumSpec]) -> list[tf.Variable]:
        is_single = self.replicas() == 1

        def make() -> list[tf.Variable]:
            sums = []
            for shape, dtype, beside in specs:
                is_placed = is_single and beside is not None
                device = _resource(beside).device if is_placed else None
                with tf.device(device):
                    sums.append(_zeros(shape, dtype))
            return sums

        made: list[tf.Variable] = self.outside_of_traces(make)
        return made

    def values_of(self, sums: Sequence[tf.Variable]) -> list[tf.Tensor]:
        return [tf.convert_to_tensor(total) for total in sums]

    def take(self, sums: Sequence[tf.Variable]) -> list[tf.Tensor]:
        return [_taken(total) for total in sums]

    def assign(
        self, sums: Sequence[tf.Variable], values: Sequence[Any]
    ) -> None:
        for total, value in zip(sums, values):
            total.assign(value)

    def increase(
        self, sums: Sequence[tf.Variable], values: Sequence[Any]
    ) -> None:
        for total, value in zip(sums, values):
            total.assign_add(tf.cast(value, total.dtype))

    def add_weighted(
        self, sums: Sequence[tf.Variable], gradients: Sequence[Any], weight: Any
    ) -> None:
        for total, gradient in zip(sums, gradients):
            _add_weighted(total, gradient, weight)

    def divided(self, tensors: Sequence[Any], by: Any) -> list[Any]:
        def share(dtype: Any) -> Any:
            return tf.math.divide_no_nan(tf.ones((), dtype), tf.cast(by, dtype))

        shares = {dtype: share(dtype) for dtype in {t.dtype for t in tensors}}
        return [tensor * shares[tensor.dtype] for tensor in tensors]

    def empty(
        self, sums: Sequence[tf.Variable], after: Sequence[Any] = ()
    ) -> None:
        for total, variable in zip(sums, after or [None] * len(sums)):
            _empty(total, variable)

    def release(self, sums: Sequence[tf.Variable]) -> None:
        for total in sums:
            _release(total)

    @contextlib.contextmanager
    def differentiating_twice(self) -> Iterator[Callable[..., list[Any]]]:
        with tf.GradientTape() as tape:

            def gradients_of(loss: Any, variables: Sequence[Any]) -> list[Any]:
                # It is over with the first gradient.
                return list(
                    tape.gradient(loss, [_resource(v) for v in variables])
                )

            yield gradients_of

    def gradients_through(
        self,
        function: Callable[[Sequence[Any]], tuple[Any, Any]],
        variables: Sequence[Any],
        tensors: Sequence[Any],
    ) -> tuple[Any, list[Any], list[Any]]:
        tensors = list(tensors)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value, beside = function(tensors)
        sources = [_resource(variable) for variable in variables]
        found = tape.gradient(value, [*sources, *tensors])
        of_tensors = found[len(sources) :]
        dense = [g if g is None else self.dense(g) for g in of_tensors]
        return beside, list(found[: len(sources)]), dense

    def dense(self, gradient: Any) -> tf.Tensor:
        return tf.convert_to_tensor(gradient)

    def squared_norm(
        self, gradients: Sequence[Any], *, is_xla: bool
    ) -> tf.Tensor:
        square = _square_by_parts if is_xla else _square
        found = [square(tf.cast(self.dense(g), tf.float32)) for g in gradients]
        return tf.add_n([tf.zeros(()), *found])

    def all_finite(self, gradients: Sequence[Any]) -> tf.Tensor:
        values = [_values(g) for g in gradients if g is not None]
        finite = [tf.reduce_all(tf.math.is_finite(v)) for v in values]
        return tf.reduce_all(tf.stack(finite))

    def zero_unless(self, where: Any, gradients: Sequence[Any]) -> list[Any]:
        def chosen(gradient: Any) -> Any:
            if gradient is None:
                return None
            values = _values(gradient)
            values = tf.where(where, values, tf.zeros_like(values))
            if isinstance(gradient, tf.IndexedSlices):
                return tf.IndexedSlices(values, gradient.indices)
            return values

        return [chosen(gradient) for gradient in gradients]

    def is_eager(self) -> bool:
        return tf.executing_eagerly()

    @contextlib.contextmanager
    def making_variables_outside(self) -> Iterator[None]:
        def make(make_inside: Any, **options: Any) -> tf.Variable:
            # A tensor is one of the trace.
            if self.is_eager() or not callable(options["initial_value"]):
                return make_inside(**options)
            # For one replica: it is their strategy that asks for each one's.
            with tf.init_scope():
                device = tf.zeros(()).device

            def run() -> tf.Variable:
                with tf.device(device):
                    return tf.Variable(**options)

            return in_a_thread(run)

        with tf.variable_creator_scope(make):
            yield

    def after(self, data: Any) -> AbstractContextManager[None]:
        if self.is_eager():
            return contextlib.nullcontext()
        flat = tf.nest.flatten(data, expand_composites=True)
        return tf.control_dependencies([t for t in flat if tf.is_tensor(t)])

    def positive(
        self, total: Any, message: str
    ) -> AbstractContextManager[None]:
        if self.is_eager():
            if not int(total) > 0:
                raise RuntimeError(message)
            return contextlib.nullcontext()
        # `tf.debugging.Assert` is a conditional.
        checked = tf.raw_ops.Assert(condition=total > 0, data=[message])
        return tf.control_dependencies([] if checked is None else [checked])

    def knows_shapes(self) -> bool:
        return self.is_eager()

    def trace(self) -> Any:
        return None if self.is_eager() else tf.compat.v1.get_default_graph()


def _square(tensor: tf.Tensor) -> tf.Tensor:
    return 2.0 * tf.nn.l2_loss(tensor)


def _square_by_parts(tensor: tf.Tensor) -> tf.Tensor:
    """The same, in one pass: XLA writes all squares to memory otherwise (2.21).

    What it adds up element by element it computes on the way.
    """
    if tensor.shape.num_elements() is None or _is_small(tensor):
        return _square(tensor)
    size = tensor.shape.num_elements()
    count = next(n for n in (8, 4, 2, 1) if size % n == 0)
    parts = tf.unstack(tf.reshape(tensor, [count, size // count]))
    return tf.reduce_sum(sum(map(tf.square, parts)))


def _zeros(shape: Any, dtype: str) -> tf.Variable:
    return tf.Variable(
        tf.zeros(shape, dtype),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _taken(total: tf.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(total)
    if _is_small(total):
        return value
    with tf.control_dependencies([value]):
        taken = _release(total)
    with tf.control_dependencies(taken):
        return tf.identity(value)


def _empty(total: tf.Variable, after: Any) -> None:
    if _is_small(total):
        _assign(total, tf.zeros(total.shape, total.dtype))
        return
    waits_for = []
    if after is not None:
        with tf.control_dependencies([tf.convert_to_tensor(after)]):
            waits_for = _release(total)
    with tf.control_dependencies(waits_for):
        # Zeros that the graph can foresee become a constant of it, which keeps
        # their memory for good and is copied by the next `add` (2.21).
        zeros = tf.raw_ops.Empty(
            shape=total.shape, dtype=total.dtype, init=True
        )
    _assign(total, zeros)


def _release(total: tf.Variable) -> list[tf.Operation]:
    """Frees a sum's memory, and returns the operations that do, in a graph."""
    # Whose shape a graph does not know: it would insist on the variable's.
    nothing = tf.raw_ops.PlaceholderWithDefault(
        input=tf.zeros([0], total.dtype), shape=tf.TensorShape(None)
    )
    return _assign(total, nothing)


def _add_weighted(total: tf.Variable, gradient: Any, weight: Any) -> None:
    is_plain = isinstance(weight, float) and weight == 1.0
    weight = tf.cast(weight, total.dtype)
    values = tf.cast(_values(gradient), total.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        tf.raw_ops.ResourceScatterAdd(
            resource=total.handle,
            indices=gradient.indices,
            updates=values if is_plain else weight * values,
        )
    elif is_plain:
        tf.raw_ops.AssignAddVariableOp(resource=total.handle, value=values)
    else:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=total.handle, alpha=-weight, delta=values
        )


def _is_small(total: Any) -> bool:
    """Whether memory is less than the operations that would save it."""
    return bool(total.shape.num_elements() < 2**16)


def _assign(total: tf.Variable, value: tf.Tensor) -> list[tf.Operation]:
    # `Variable.assign` insists on the shape. A variable's handle outlives its
    # value, so what was compiled with an emptied sum stays valid.
    assigned = [
        tf.raw_ops.AssignVariableOp(resource=handle, value=value)
        for handle in handles(total)
    ]
    return [operation for operation in assigned if operation is not None]


def _values(gradient: Any) -> Any:
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    return gradient.values if is_sparse else gradient


def _resource(variable: Any) -> Any:
    is_keras = isinstance(variable, keras.Variable)
    return variable.value if is_keras else variable
