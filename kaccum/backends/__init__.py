"""Which framework computes: one `Backend` for each that Keras runs on.

`kaccum.backends.torch` is the one to read first: there nothing is traced.
"""

from __future__ import annotations

import functools
import importlib

import keras

from kaccum.backends.base import Backend, SumSpec
from kaccum.backends.runner import Ran, Runner
from kaccum.backends.tester import Tester

__all__ = ["Backend", "Ran", "Runner", "SumSpec", "Tester", "backend"]

_NAMES = ("tensorflow", "jax", "torch")


def backend() -> Backend:
    """What computes where Keras does. No other framework is imported.

    Raises:
        RuntimeError: If there is none for Keras's backend.
    """
    name = keras.backend.backend()
    if name not in _NAMES:
        raise RuntimeError(
            "Gradients are accumulated on the Keras backends "
            f"{', '.join(_NAMES)} only. Received: backend={name!r}. Set the "
            "environment variable `KERAS_BACKEND` to one of them."
        )
    return _made(name)


# It is asked for in each micro-batch.
@functools.cache
def _made(name: str) -> Backend:
    module = importlib.import_module(f"kaccum.backends.{name}")
    made: Backend = module.BACKEND
    return made
