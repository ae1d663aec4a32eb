"""Which engine runs: one for each framework that Keras computes with.

An engine is a package with the functions that its `__all__` names, the same
for all, and a class `Engine` that runs a model's steps. `kaccum.torch` is the
one to read first: there nothing is traced.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import keras

_BACKENDS = ("tensorflow", "jax", "torch")


def engine() -> ModuleType:
    """The module for Keras's backend: its arithmetic and its `Engine`.

    No other framework is imported.

    Raises:
        RuntimeError: If there is none for it.
    """
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise RuntimeError(
            "Gradients are accumulated on the Keras backends "
            f"{', '.join(_BACKENDS)} only. Received: backend={name!r}. Set the "
            "environment variable `KERAS_BACKEND` to one of them."
        )
    return _module(f"kaccum.{name}")


# It is asked for in each micro-batch.
_module = functools.cache(importlib.import_module)


class Ran(NamedTuple):
    """What a call of a train function did.

    Args:
        logs: The last step's logs.
        micro_batches: How many there were before the data came to its end.
        updates: How many updates were made.
    """

    logs: Any
    micro_batches: int
    updates: int
