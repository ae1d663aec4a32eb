"""Arithmetic on sums and gradients, and where it is done."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf


def new_sum(shape: Any, dtype: str, beside: Any = None) -> tf.Variable:
    """A variable of zeros, also while a function is traced.

    Which variables have gradients is first known inside the trace.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        beside: A variable whose device it shares.
    """
    device = "" if beside is None else _resource(beside).device
    return _made_outside(
        lambda: tf.Variable(tf.zeros(shape, dtype), trainable=False), device
    )


def _made_outside(make: Callable[[], Any], device: str) -> Any:
    """Makes a variable outside of the function that is being traced.

    Inside, or in `tf.init_scope`, it would belong to the function and have it
    traced a second time; a thread of its own is outside.
    """

    def run() -> Any:
        with tf.device(device):
            return make()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


def value_of(total: tf.Variable) -> tf.Tensor:
    """What a sum holds."""
    return tf.convert_to_tensor(total)


def copy(variable: Any) -> tf.Tensor:
    """What a Keras variable holds now."""
    return tf.identity(_resource(variable))


def increase(total: tf.Variable, value: Any) -> None:
    """`total += value`."""
    total.assign_add(tf.cast(value, total.dtype))


def take_larger(total: tf.Variable, value: Any) -> None:
    """`total = max(total, value)`."""
    total.assign(tf.maximum(total, value))


def add_weighted(total: tf.Variable, gradient: Any, weight: Any) -> None:
    """`total += weight * gradient`, in one pass over memory."""
    weight = tf.cast(weight, total.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values = weight * tf.cast(gradient.values, total.dtype)
        total.scatter_add(tf.IndexedSlices(values, gradient.indices))
    else:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=total.handle,
            alpha=-weight,
            delta=tf.cast(gradient, total.dtype),
        )


def empty(total: tf.Variable) -> None:
    """Makes a sum zero, also one that was released."""
    _assign(total, tf.zeros(total.shape, total.dtype))


def release(total: tf.Variable) -> None:
    """Frees a sum's memory."""
    _assign(total, tf.zeros([0], total.dtype))


def _assign(total: tf.Variable, value: tf.Tensor) -> None:
    # `Variable.assign` insists on the shape. A variable's handle outlives its
    # value, so what was compiled with an emptied sum stays valid.
    tf.raw_ops.AssignVariableOp(resource=total.handle, value=value)


def _resource(variable: Any) -> Any:
    is_keras = isinstance(variable, keras.Variable)
    return variable.value if is_keras else variable


def is_eager() -> bool:
    """Whether what is called now is run now."""
    return tf.executing_eagerly()


def outside_of_traces() -> AbstractContextManager[None]:
    """A context in which variables can be made for good."""
    return tf.init_scope()


@contextlib.contextmanager
def making_variables_outside() -> Iterator[None]:
    """Has variables that are made in a trace be made outside of it.

    They hold their first value at once, and the function, which does not own
    them, need not be traced a second time.
    """
    if is_eager():
        yield
        return

    def make(make_inside: Any, **options: Any) -> tf.Variable:
        if not callable(options["initial_value"]):
            # A tensor of the trace.
            return make_inside(**options)
        with tf.init_scope():
            device = tf.zeros(()).device
        return _made_outside(functools.partial(tf.Variable, **options), device)

    with tf.variable_creator_scope(make):
        yield


def after(data: Any) -> AbstractContextManager[None]:
    """A context whose operations wait for every tensor in `data`."""
    flat = tf.nest.flatten(data, expand_composites=True)
    return tf.control_dependencies([t for t in flat if tf.is_tensor(t)])


def positive(
    total: tf.Variable, message: str
) -> AbstractContextManager[None]:
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


def use_full_precision() -> str:
    """Turns TensorFloat-32 off, for comparisons to rounding.

    Returns:
        The name of the device that TensorFlow computes on by default.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_logical_devices("GPU")
    return gpus[0].name if gpus else "CPU (not run on a GPU)"
