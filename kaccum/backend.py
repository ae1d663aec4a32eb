"""Which engine runs: one file for each framework that Keras computes with."""

from __future__ import annotations

import importlib
from types import ModuleType

import keras


def engine() -> ModuleType:
    """The module for Keras's backend: its arithmetic and its `Engine`.

    Raises:
        RuntimeError: If there is none for it.
    """
    name = keras.backend.backend()
    if name != "tensorflow":
        raise RuntimeError(
            "Gradients are accumulated on Keras's TensorFlow backend only. "
            f"Received: backend={name!r}. Set the environment variable "
            "`KERAS_BACKEND=tensorflow`."
        )
    return importlib.import_module("kaccum.tensorflow")
