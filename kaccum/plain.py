"""What an engine says where there are neither replicas nor graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras import ops


def check_devices(model: keras.Model) -> None:
    """Checks nothing: a step runs on all the devices there are."""


def replicas_of(model: keras.Model) -> int:
    """The number of replicas that a model trains on."""
    return 1


def replicas() -> int:
    """The number of replicas at work."""
    return 1


def may_be_empty(data: Any) -> bool:
    """Whether a replica's batch may have no examples."""
    return False


def scope_of(model: keras.Model) -> AbstractContextManager[None]:
    """A context in which variables are made for all replicas of a model."""
    return contextlib.nullcontext()


def sum_over_replicas(tensors: Sequence[Any]) -> list[Any]:
    """The tensors, each summed over the replicas."""
    return list(tensors)


def dense(gradient: Any) -> Any:
    """A gradient as a tensor."""
    return gradient


def as_row(value: Any) -> Any:
    """A tensor with a row for each replica."""
    return ops.convert_to_tensor(value)[None]


def rows_of(tensor: Any) -> list[Any]:
    """The values of all replicas, of a sum of what `as_row` returned."""
    return [tensor[0]]


def patches_for_whole_gradients(optimizers: Sequence[Any]) -> list[Any]:
    """What an optimizer must not do where each replica has the whole gradient.

    Args:
        optimizers: Those that make an update.
    """
    return []


def devices(count: int) -> Any:
    """What makes a model train on several devices.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "Models train on one device where Keras runs on "
        f"{keras.backend.backend()}. Received: {count} replicas."
    )


def knows_shapes() -> bool:
    """Whether Keras knows the size of a batch while a step runs."""
    return True


def trace() -> None:
    """What is being traced: it need not be known."""


def after(data: Any) -> AbstractContextManager[None]:
    """A context whose operations wait for `data`: they do by themselves."""
    return contextlib.nullcontext()


def making_variables_outside() -> AbstractContextManager[None]:
    """A context for variables made in a trace: Keras makes none."""
    return contextlib.nullcontext()


def all_finite(gradients: Sequence[Any]) -> Any:
    """Whether no gradient holds a NaN or an infinity, a scalar bool."""
    finite = [ops.all(ops.isfinite(g)) for g in gradients if g is not None]
    return ops.all(ops.stack(finite))


def zero_unless(where: Any, gradients: Sequence[Any]) -> list[Any]:
    """The gradients, or zeros of their shapes where `where` is false."""
    return [
        g if g is None else ops.where(where, g, ops.zeros_like(g))
        for g in gradients
    ]
