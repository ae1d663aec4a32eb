"""The oldest versions of what kaccum computes with."""

from __future__ import annotations

import re
import sys

import keras

#: By module, on each backend, as in `setup.cfg`: `python -m tests.versions`
#: runs the tests on them.
OLDEST = {"keras": "3.12.4", "numpy": "1.26.4"}
#: What one backend needs beside, or newer.
OLDEST_ON = {
    "tensorflow": {"tensorflow": "2.19.1"},
    # With Keras 3.12 and 3.13 losses of the whole batch are another run on
    # several devices; JAX itself needs NumPy 2.
    "jax": {"jax": "0.10.2", "keras": "3.15.1", "numpy": "2.0"},
    # Before Keras 3.15 the gradient of a loss whose mask leaves no element is a
    # NaN that must be zero: micro-batches have such, large batches rarely.
    "torch": {"torch": "2.9", "keras": "3.15"},
}


def check() -> None:
    """Checks what is installed, of the frameworks that Keras's alone.

    Raises:
        ImportError: If it is older than it may be.
    """
    name_of_backend = keras.backend.backend()
    needed = {**OLDEST, **OLDEST_ON.get(name_of_backend, {})}
    for name, oldest in needed.items():
        # Keras has imported them.
        version = sys.modules[name].__version__
        if _numbers(version) < _numbers(oldest):
            raise ImportError(
                f"kaccum needs {name} {oldest} or newer where Keras runs on "
                f"{name_of_backend}, but {name} {version} is installed: "
                "upgrade the package that brings it."
            )


def _numbers(version: str) -> list[int]:
    """Those of a release, as [3, 16, 0] of "3.16.0.dev2026102704"."""
    return [int(each) for each in re.findall(r"(?:^|\.)(\d+)", version)[:3]]
