"""Who asks? Only the stack knows on whose behalf Keras calls kaccum."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import keras

_HERE = os.path.dirname(__file__) + os.sep
_normalize = keras.layers.BatchNormalization.call.__code__


def asking() -> Iterator[FrameType]:
    """The frames that called into kaccum, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_asked_by(name: str, model: keras.Model) -> bool:
    """Whether the method `name` of `model` asks.

    `fit` asks the model for its metrics once an epoch, right after the last
    batch (also when a callback stopped the epoch) and before validation and
    `on_epoch_end`. `evaluate` asks too, from the same helper, so only the stack
    tells them apart (`_get_metrics_result_or_logs`, Keras 3.5 to 3.15).
    """
    frames = asking()
    frame = next(frames, None)
    if frame and frame.f_code.co_name == "_get_metrics_result_or_logs":
        frame = next(frames, None)
    return _is_method(frame, name, model)


def is_inside_fit(model: keras.Model) -> bool:
    """Whether who asks was itself called while `model` fits.

    A callback may train the model on a batch of its own. A `fit` that asks is
    a new one: what went before it was interrupted.
    """
    frames = asking()
    if _is_method(next(frames, None), "fit", model):
        return False
    return any(_is_method(frame, "fit", model) for frame in frames)


def is_fit_inside_fit(model: keras.Model) -> bool:
    """Whether a `fit` of `model` asks that another one called.

    A `fit` of a subclass that calls Keras's is the same one.
    """
    frames = asking()
    inner = next(frames, None)
    if inner is None or not _is_method(inner, "fit", model):
        return False
    outer = (frame for frame in frames if _is_method(frame, "fit", model))
    return any(frame.f_code is inner.f_code for frame in outer)


def is_called_in_fit(model: keras.Model) -> bool:
    """Whether the `fit` of `model` runs."""
    return any(_is_method(frame, "fit", model) for frame in asking())


def is_in_callback(model: keras.Model) -> bool:
    """Whether a callback of the `fit` of `model` asks, which may go on."""
    kind = keras.callbacks.CallbackList
    for frame in asking():
        if _is_method(frame, "fit", model):
            return False
        if isinstance(frame.f_locals.get("self"), kind):
            return True
    return False


def variable_of_fit(model: keras.Model, name: str) -> Any:
    """A local variable of Keras's `fit` that runs, `None` if it has none."""
    for frame in asking():
        if _is_method(frame, "fit", model) and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def callbacks_of_fit() -> list[keras.callbacks.Callback]:
    """The callbacks of the `fit` that calls a callback's hook.

    A callback is not told of the others (Keras 3.5 to 3.15).
    """
    for frame in asking():
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList):
            return list(owner.callbacks)
    return []


def is_keras_normalization() -> bool:
    """Whether `BatchNormalization.call` asks.

    What a subclass makes of the moments, or `renorm` does, cannot be known.
    """
    frame = next(asking(), None)
    if frame is None or frame.f_code is not _normalize:
        return False
    return not getattr(frame.f_locals["self"], "renorm", False)


def _is_method(frame: FrameType | None, name: str, model: Any) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == name
        and frame.f_locals.get("self") is model
    )
