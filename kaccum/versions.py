"""The oldest versions of what kaccum computes with."""

from __future__ import annotations

import re
import sys

import keras
import numpy as np

#: By module, as in `setup.cfg`; `python -m tests.versions` runs the tests on
#: them.
OLDEST = {
    "keras": "3.12.4",
    "numpy": "1.26.4",
    "tensorflow": "2.19.1",
    "jax": "0.10.2",
    "torch": "2.9",
}
#: Keras's own on one of its backends, where that is newer. Before, on PyTorch
#: its gradient of a loss whose mask leaves no element is a NaN that must be
#: zero: micro-batches have such, large batches rarely. On JAX losses of the
#: whole batch were not the large batch's on several devices (3.12, 3.13).
OLDEST_KERAS_ON = {"jax": "3.15.1", "torch": "3.15"}


def check() -> None:
    """Checks what is installed, of the frameworks that Keras's alone.

    Raises:
        ImportError: If it is older than `OLDEST`.
    """
    found = {"keras": keras.__version__, "numpy": np.__version__}
    # Keras has imported it.
    framework = sys.modules.get(keras.backend.backend())
    if framework is not None:
        found[framework.__name__] = framework.__version__
    for name, version in found.items():
        oldest = OLDEST.get(name, "0")
        if name == "keras":
            oldest = OLDEST_KERAS_ON.get(keras.backend.backend(), oldest)
        if _numbers(version) < _numbers(oldest):
            raise ImportError(
                f"kaccum needs {name} {oldest} or newer where Keras runs on "
                f"{keras.backend.backend()}, but {name} {version} is "
                "installed: upgrade the package that brings it."
            )


def _numbers(version: str) -> list[int]:
    """Those of a release, as [3, 16, 0] of "3.16.0.dev2026102704"."""
    return [int(each) for each in re.findall(r"(?:^|\.)(\d+)", version)[:3]]
