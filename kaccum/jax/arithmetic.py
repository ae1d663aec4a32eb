"""Arithmetic on sums and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from kaccum.jax import cells
from kaccum.jax.cells import Cell
from kaccum.jax.state import whole_state


def new_sum(shape: Any, dtype: str, beside: Any = None) -> Cell:
    """A cell of zeros, also while a function is traced.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        beside: A variable that it is distributed like.
    """
    if beside is None:
        return Cell(shape, dtype, cells.everywhere(len(shape)))
    return Cell(shape, dtype, cells.sharding_of(beside))


def new_variable(shape: Any, dtype: Any, name: str) -> Cell:
    """A cell of zeros."""
    return new_sum(shape, dtype)


def note(value: Any) -> Any:
    """A scalar of a step, for `noted`.

    What a function computes whose gradient is taken is of use outside of it
    only if the function returns it.
    """
    if isinstance(value, float):
        return value
    cell = Cell(is_note=True)
    frame = cells.frame()
    if frame is not None and frame.is_reached:
        frame.write(cell, value)
    return cell


def noted(note: Any) -> Any:
    """The scalar that was noted."""
    return note.value if isinstance(note, Cell) else note


def is_reachable(tensor: Any) -> bool:
    """Whether a note can be used here."""
    frame = cells.frame()
    if not isinstance(tensor, Cell) or frame is None:
        return True
    return frame.knows(tensor)


def value_of(total: Cell) -> jax.Array:
    """What a sum holds."""
    return total.value


#: The memory of what is donated is used again by itself.
take = value_of


def increase(total: Cell, value: Any) -> None:
    """`total += value`."""
    total.assign(total.value + jnp.asarray(value, total.dtype))


def take_larger(total: Cell, value: Any) -> None:
    """`total = max(total, value)`."""
    total.assign(jnp.maximum(total.value, value.astype(total.dtype)))


def add_weighted(
    sums: Sequence[Cell], gradients: Sequence[Any], weight: Any
) -> None:
    """`total += weight * gradient`."""
    for total, gradient in zip(sums, gradients):
        gradient = gradient.astype(total.dtype)
        weighted = jnp.asarray(weight, total.dtype) * gradient
        total.assign(total.value + weighted)


def divided(tensors: Sequence[Any], by: Any) -> list[Any]:
    """The tensors divided by a scalar, zeros where that is zero."""
    return [
        tensor * jnp.where(by == 0, 0, 1 / by.astype(tensor.dtype))
        for tensor in tensors
    ]


def empty(total: Cell, after: Any = None) -> None:
    """Makes a sum zero, also one that was released."""
    if cells.frame() is None:
        total.fill()
    else:
        total.assign(jnp.zeros(total.shape, total.dtype))


def release(total: Cell) -> None:
    """Frees a sum's memory."""
    total.now = None


def is_eager() -> bool:
    """Whether what is called now is run now."""
    return not cells.is_traced()


def is_traced_in(outer: None) -> bool:
    """Whether what is called now belongs to the step, or to its gradient."""
    return can_hear()


def outside_of_traces(make: Callable[[], Any]) -> Any:
    """What `make` returns, called where nothing is traced."""
    with cells.entered(None), jax.ensure_compile_time_eval():
        return make()


@contextlib.contextmanager
def positive(total: Any, message: str) -> Iterator[None]:
    """A context that is entered only where `total > 0`.

    Raises:
        RuntimeError: Where that is known.
    """
    if not isinstance(total, jax.core.Tracer) and not int(total) > 0:
        raise RuntimeError(message)
    yield


def gradients_of(
    loss: Callable[[], Any], variables: Sequence[Any]
) -> list[Any]:
    """The gradients of what `loss` returns."""
    with whole_state():
        values = [variable.value for variable in variables]

    def loss_at(values: list[Any]) -> Any:
        with whole_state(zip(variables, values)):
            return loss()

    return list(jax.grad(loss_at)(values))


def use_full_precision() -> None:
    """Makes products as precise as their dtypes."""
    jax.config.update("jax_default_matmul_precision", "highest")


def device_name() -> str:
    """The device that JAX computes on by default."""
    device = jax.devices()[0]
    note = " (not run on a GPU)" if device.platform == "cpu" else ""
    return f"{device.platform.upper()}{note}"


def devices(count: int) -> keras.distribution.DataParallel:
    """What makes a model train on so many GPUs, or parts of the processor.

    To be called before anything is computed.
    """
    jax.config.update("jax_num_cpu_devices", count)
    names = keras.distribution.list_devices()
    return keras.distribution.DataParallel(devices=names[:count])


def can_hear() -> bool:
    """Whether what is called now may use cells.

    Not inside of a `jax.jit` of the user's own, which is traced once.
    """
    frame = cells.frame()
    return frame is None or frame.is_reached
