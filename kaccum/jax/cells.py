"""Values of ours that are threaded through what JAX traces.

A function that JAX traces must get what it reads as an argument and return what
it changes. A `Cell` looks like a variable: a `Frame` stands for the function
that is being traced, knows what cells hold in it, and which ones it needs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend.core import get_opaque_trace_state

from kaccum.patches import SharedPatch

_thread = threading.local()


class Frame:
    """What cells hold in a function that is being traced, or run.

    Args:
        outer: The frame that the function is called in, if there is one.
        values: What cells hold at its start.
    """

    def __init__(
        self,
        outer: Frame | None = None,
        values: dict[Cell, Any] | None = None,
    ) -> None:
        self.outer = outer
        self.values = dict(values or {})
        #: Those that it used and was not given.
        self.missing: list[Cell] = []
        self._trace = get_opaque_trace_state()

    @property
    def is_reached(self) -> bool:
        """Whether what runs now is the function itself, and none inside it."""
        return bool(self._trace == get_opaque_trace_state())

    def knows(self, cell: Cell) -> bool:
        """Whether a cell holds something, in this function or an outer one."""
        if cell in self.values:
            return True
        return self.outer is not None and self.outer.knows(cell)

    def read(self, cell: Cell) -> Any:
        """What a cell holds."""
        if cell not in self.values and self.outer is not None:
            return self.outer.read(cell)
        if cell not in self.values:
            self.missing.append(cell)
            self.values[cell] = cell.now
        return self.values[cell]

    def write(self, cell: Cell, value: Any) -> None:
        """Makes a cell hold something."""
        is_known = cell in self.values or cell.is_note
        if self.outer is None and not is_known:
            self.missing.append(cell)
        self.values[cell] = value


def frame() -> Frame | None:
    """The frame of what this thread runs."""
    return getattr(_thread, "frame", None)


@contextlib.contextmanager
def entered(inner: Frame | None) -> Iterator[None]:
    """Makes a frame that of this thread, or none."""
    previous = frame()
    _thread.frame = inner
    try:
        yield
    finally:
        _thread.frame = previous


class Cell:
    """A number or array of ours.

    Args:
        shape: Its shape.
        dtype: Its dtype; where JAX has none of 64 bits, that of 32.
        sharding: Where its parts are, or `None` for the default device.
        is_note: Whether it lasts no longer than the function that writes it.
    """

    def __init__(
        self,
        shape: Sequence[int] = (),
        dtype: str = "float32",
        sharding: Any = None,
        *,
        is_note: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = str(jax.dtypes.canonicalize_dtype(dtype))
        self.sharding = sharding
        self.is_note = is_note
        #: What it holds where nothing is traced.
        self.now: Any = None
        if not is_note:
            self.fill()

    @property
    def value(self) -> Any:
        """What it holds."""
        now = frame()
        return self.now if now is None else now.read(self)

    def assign(self, value: Any) -> None:
        """Makes it hold something."""
        now = frame()
        if now is not None:
            now.write(self, value)
        elif is_traced():
            raise RuntimeError(
                "Gradients must be accumulated outside of functions that JAX "
                "traces (`jax.jit`, `jax.grad`). Received: a call inside of "
                "one. Return the gradients from it."
            )
        else:
            self.now = value

    def fill(self) -> None:
        """Makes it hold zeros, at once."""
        with jax.ensure_compile_time_eval():
            self.now = jnp.zeros(self.shape, self.dtype, device=self.sharding)

    def __jax_array__(self) -> Any:
        return self.value


with jax.ensure_compile_time_eval():
    _NO_TRACE = get_opaque_trace_state()


def is_traced() -> bool:
    """Whether what is called now is traced."""
    return bool(get_opaque_trace_state() != _NO_TRACE)


def sharding_of(variable: Any) -> Any:
    """Where the parts of a variable are, `None` for the default device."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return distribution.get_variable_layout(variable).backend_layout


def everywhere(axes: int) -> Any:
    """A copy of an array with so many axes on each device, as a sharding."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh = distribution.device_mesh
    return keras.distribution.TensorLayout([None] * axes, mesh).backend_layout


# Taken at import: JAX's own.
_value_and_grad, _grad = jax.value_and_grad, jax.grad


def _differentiating(
    real: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Any = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """`real`, with cells leaving `fun` as what it returns beside."""

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        outer = frame()
        if outer is None or not outer.is_reached:
            return real(fun, argnums, has_aux, **options)(*args, **kwargs)
        cells: list[Cell] = []

        def inside(*args: Any, **kwargs: Any) -> Any:
            inner = Frame(outer)
            with entered(inner):
                result = fun(*args, **kwargs)
            value, beside = result if has_aux else (result, None)
            cells[:] = inner.values
            left = jax.lax.stop_gradient(list(inner.values.values()))
            return value, (beside, left)

        derive = real(inside, argnums, True, **options)
        first, second = derive(*args, **kwargs)
        if real is _grad:
            beside, left = second
            result = (first, beside) if has_aux else first
        else:
            value, (beside, left) = first
            result = ((value, beside) if has_aux else value), second
        for cell, held in zip(cells, left):
            outer.write(cell, held)
        return result

    return call


#: Contexts in which cells leave the functions whose gradients are taken.
leaving_gradients = (
    SharedPatch(
        jax,
        "value_and_grad",
        functools.partial(_differentiating, _value_and_grad),
    ),
    SharedPatch(jax, "grad", functools.partial(_differentiating, _grad)),
)
