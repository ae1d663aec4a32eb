"""Arithmetic on sums and gradients, and where it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from kaccum.tensorflow.replicas import (
    handles,
    in_a_thread,
    local_values,
    outside_of_traces,
    replicas,
)


def new_sum(shape: Any, dtype: str, beside: Any = None) -> tf.Variable:
    """A variable of zeros, also while a function is traced.

    Which variables have gradients is first known inside the trace. Each replica
    has a sum of its own.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        beside: A variable whose device it shares.
    """

    def make() -> tf.Variable:
        return tf.Variable(
            tf.zeros(shape, dtype),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    is_single = beside is not None and replicas() == 1
    device = _resource(beside).device if is_single else ""
    return outside_of_traces(make, device)


def value_of(total: tf.Variable) -> tf.Tensor:
    """What a sum holds, on all replicas where it is not asked by one."""
    return tf.convert_to_tensor(total)


def take(total: tf.Variable) -> tf.Tensor:
    """What a sum holds, whose memory is then no longer the sum's.

    What is computed of it next can be computed in place. Until `empty` the sum
    must not be used.
    """
    value = tf.convert_to_tensor(total)
    if _is_small(total):
        return value
    with tf.control_dependencies([value]):
        taken = release(total)
    with tf.control_dependencies(taken):
        return tf.identity(value)


def copy(variable: Any) -> list[tf.Tensor]:
    """What a Keras variable holds now, on each replica."""
    return [tf.identity(part) for part in local_values(_resource(variable))]


def restore(variable: Any, before: list[tf.Tensor]) -> None:
    """Makes a Keras variable hold what `copy` returned."""
    for part, value in zip(local_values(_resource(variable)), before):
        part.assign(value)


def increase(total: tf.Variable, value: Any) -> None:
    """`total += value`."""
    total.assign_add(tf.cast(value, total.dtype))


def take_larger(total: tf.Variable, value: Any) -> None:
    """`total = max(total, value)`."""
    total.assign(tf.maximum(total, value))


def add_weighted(
    sums: Sequence[tf.Variable], gradients: Sequence[Any], weight: Any
) -> None:
    """`total += weight * gradient`, each in one pass over memory."""
    for total, gradient in zip(sums, gradients):
        _add_weighted(total, gradient, tf.cast(weight, total.dtype))


def _add_weighted(total: tf.Variable, gradient: Any, weight: Any) -> None:
    if isinstance(gradient, tf.IndexedSlices):
        values = weight * tf.cast(gradient.values, total.dtype)
        tf.raw_ops.ResourceScatterAdd(
            resource=total.handle, indices=gradient.indices, updates=values
        )
    else:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=total.handle,
            alpha=-weight,
            delta=tf.cast(gradient, total.dtype),
        )


def divided(tensors: Sequence[Any], by: Any) -> list[Any]:
    """The tensors divided by a scalar, zeros where that is zero."""

    def share(dtype: Any) -> Any:
        return tf.math.divide_no_nan(tf.ones((), dtype), tf.cast(by, dtype))

    shares = {dtype: share(dtype) for dtype in {t.dtype for t in tensors}}
    return [tensor * shares[tensor.dtype] for tensor in tensors]


def empty(total: tf.Variable, after: Any = None) -> None:
    """Makes a sum zero, also one that was released.

    Args:
        total: The sum.
        after: A variable whose last assignment comes first, and whose update
            is not to take memory at the same time as what the sum holds and
            its zeros.
    """
    if _is_small(total):
        _assign(total, tf.zeros(total.shape, total.dtype))
        return
    waits_for = []
    if after is not None:
        with tf.control_dependencies([tf.convert_to_tensor(after)]):
            waits_for = release(total)
    with tf.control_dependencies(waits_for):
        # Zeros that the graph can foresee become a constant of it, which keeps
        # their memory for good and is copied by the next `add` (2.21).
        zeros = tf.raw_ops.Empty(
            shape=total.shape, dtype=total.dtype, init=True
        )
    _assign(total, zeros)


def _is_small(total: tf.Variable) -> bool:
    """Whether memory is less than the operations that would save it."""
    return bool(total.shape.num_elements() < 2**16)


def release(total: tf.Variable) -> list[tf.Operation]:
    """Frees a sum's memory.

    Returns:
        The operations that do, in a graph.
    """
    # Whose shape a graph does not know: it would insist on the variable's.
    nothing = tf.raw_ops.PlaceholderWithDefault(
        input=tf.zeros([0], total.dtype), shape=tf.TensorShape(None)
    )
    return _assign(total, nothing)


def _assign(total: tf.Variable, value: tf.Tensor) -> list[tf.Operation]:
    # `Variable.assign` insists on the shape. A variable's handle outlives its
    # value, so what was compiled with an emptied sum stays valid.
    assigned = [
        tf.raw_ops.AssignVariableOp(resource=handle, value=value)
        for handle in handles(total)
    ]
    return [operation for operation in assigned if operation is not None]


def _resource(variable: Any) -> Any:
    is_keras = isinstance(variable, keras.Variable)
    return variable.value if is_keras else variable


def train_step_of(model: keras.Model) -> Callable[[Any], Any]:
    """A model's training step: a function of what `fit` gives it.

    A `tf.function` would be traced once, for *add* and *update* alike.
    """
    step = model.train_step
    return getattr(step, "python_function", step)


def knows_shapes() -> bool:
    """Whether Keras knows the size of a batch while a step runs."""
    return is_eager()


def is_eager() -> bool:
    """Whether what is called now is run now."""
    return tf.executing_eagerly()


@contextlib.contextmanager
def making_variables_outside() -> Iterator[None]:
    """Has variables that are made in a trace be made outside of it.

    They hold their first value at once, and the function, which does not own
    them, need not be traced a second time.
    """

    def make(make_inside: Any, **options: Any) -> tf.Variable:
        # A tensor is one of the trace.
        if is_eager() or not callable(options["initial_value"]):
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


def after(data: Any) -> AbstractContextManager[None]:
    """A context whose operations wait for every tensor in `data`."""
    if is_eager():
        return contextlib.nullcontext()
    flat = tf.nest.flatten(data, expand_composites=True)
    return tf.control_dependencies([t for t in flat if tf.is_tensor(t)])


def positive(total: Any, message: str) -> AbstractContextManager[None]:
    """A context that is entered only where `total > 0`.

    Raises:
        RuntimeError: Eagerly; in a graph, `tf.errors.InvalidArgumentError`.
    """
    if is_eager():
        if not int(total) > 0:
            raise RuntimeError(message)
        return contextlib.nullcontext()
    # `tf.debugging.Assert` is a conditional.
    checked = tf.raw_ops.Assert(condition=total > 0, data=[message])
    return tf.control_dependencies([] if checked is None else [checked])


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Whether no gradient holds a NaN or an infinity, a scalar bool."""
    values = [_values(g) for g in gradients if g is not None]
    finite = [tf.reduce_all(tf.math.is_finite(v)) for v in values]
    return tf.reduce_all(tf.stack(finite))


def zero_unless(where: Any, gradients: Sequence[Any]) -> list[Any]:
    """The gradients, or zeros of their shapes where `where` is false."""

    def chosen(gradient: Any) -> Any:
        if gradient is None:
            return None
        values = _values(gradient)
        values = tf.where(where, values, tf.zeros_like(values))
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(values, gradient.indices)
        return values

    return [chosen(gradient) for gradient in gradients]


def _values(gradient: Any) -> Any:
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    return gradient.values if is_sparse else gradient


def gradients_of(
    loss: Callable[[], Any], variables: Sequence[Any]
) -> list[Any]:
    """The gradients of what `loss` returns, a tensor or `None` each."""
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, [_resource(v) for v in variables])
    return [g if g is None else tf.convert_to_tensor(g) for g in gradients]


def dense(gradient: Any) -> tf.Tensor:
    """A gradient as a tensor, where repeated rows of a sparse one add up."""
    return tf.convert_to_tensor(gradient)


def is_reachable(tensor: Any) -> bool:
    """Whether the graph that is being traced may use `tensor`.

    What is inside a `tf.function` of the user's own is in another graph.
    """
    if tensor is None or not hasattr(tensor, "graph"):
        return True
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def trace() -> Any:
    """What is being traced, or `None` where what is called is run now."""
    return None if is_eager() else tf.compat.v1.get_default_graph()


def is_traced_in(outer: Any) -> bool:
    """Whether what is called now belongs to what `trace` returned.

    So do the branches of its conditionals and the bodies of its loops, but no
    other function that is traced meanwhile.
    """
    inner = trace()
    while inner is not outer and getattr(inner, "is_control_flow_graph", False):
        inner = inner.outer_graph
    return inner is outer


def use_full_precision() -> None:
    """Turns TensorFloat-32 off, for comparisons to rounding."""
    tf.config.experimental.enable_tensor_float_32_execution(False)


def device_name() -> str:
    """The device that TensorFlow computes on by default."""
    gpus = tf.config.list_logical_devices("GPU")
    return gpus[0].name if gpus else "CPU (not run on a GPU)"
