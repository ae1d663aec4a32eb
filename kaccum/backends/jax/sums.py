"""Arrays of kaccum's own that what JAX traces reads and changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras


class Sum:
    """A number or array of kaccum's own, zeros at first.

    A function that JAX traces must get what it reads as an argument and return
    what it changes: `JaxRunner` puts the one in `value`, and takes the other
    out.

    Args:
        shape: Its shape.
        dtype: Its dtype; where JAX has none of 64 bits, that of 32.
        beside: A Keras variable that it is distributed like. With `None` each
            device has a copy.
    """

    def __init__(self, shape: Any, dtype: str, beside: Any) -> None:
        self.shape = tuple(shape)
        self.dtype = str(jax.dtypes.canonicalize_dtype(dtype))
        if beside is None:
            self.sharding = _everywhere(len(self.shape))
        else:
            self.sharding = sharding_of(beside)
        #: What it holds; `None` where its memory is freed.
        self.value: Any = None
        self.fill()

    def fill(self) -> None:
        """Makes it hold zeros, at once, whatever is being traced."""
        with jax.ensure_compile_time_eval():
            self.value = jnp.zeros(self.shape, self.dtype, device=self.sharding)


def sharding_of(variable: Any) -> Any:
    """Where the parts of a variable are, `None` for the default device."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return distribution.get_variable_layout(variable).backend_layout


def constrained(value: Any, sharding: Any) -> Any:
    """A value in a trace, whose parts are to be there."""
    if sharding is None:
        return value
    return jax.lax.with_sharding_constraint(value, sharding)


def placed(variables: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Values of variables in a trace, which are to be where those are."""
    if keras.distribution.distribution() is None:
        return list(values)
    return [constrained(x, sharding_of(v)) for v, x in zip(variables, values)]


def _everywhere(axes: int) -> Any:
    """A copy of an array with so many axes on each device, as a sharding."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh = distribution.device_mesh
    return keras.distribution.TensorLayout([None] * axes, mesh).backend_layout
