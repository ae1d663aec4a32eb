"""Names of Keras that are not public, each with the reason it is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import keras

# Where a loss is reduced to a number: the only place that sees the per-example
# values, the sample weights and the mask together (Keras 3.5 to 3.15).
from keras.src.losses import loss as loss_module

__all__ = [
    "asked_by",
    "callbacks_of_fit",
    "compiled_loss",
    "hand_over_state",
    "is_fit_inside_fit",
    "is_inside_fit",
    "is_inside_plain_normalization",
    "loss_module",
    "moments_of_batch",
    "normalizations_of",
    "variables_of",
]


def compiled_loss(model: keras.Model) -> Any:
    """The object that `compile(loss=...)` made, or `None`.

    `model.loss` is what the user passed; the object that calls it has no public
    name (Keras 3.5 to 3.15).
    """
    return model._compile_loss


# The mean and the variance that a layer normalises a batch with: they have no
# other name, and the averages that follow from them round them away (Keras 3.5
# to 3.15). Taken at import: Keras's own.
moments_of_batch = keras.layers.BatchNormalization._moments
_call = keras.layers.BatchNormalization.call


def is_inside_plain_normalization() -> bool:
    """Whether the caller's caller is `BatchNormalization.call`.

    What a subclass makes of the moments, or `renorm` does, cannot be known.
    """
    frame: FrameType | None = sys._getframe(2)
    if frame is None or frame.f_code is not _call.__code__:
        return False
    return not getattr(frame.f_locals["self"], "renorm", False)


def normalizations_of(model: keras.Model) -> list[Any]:
    """The `BatchNormalization`s of a model, also those inside of others.

    `model.layers` has the outermost only (Keras 3.5 to 3.15).
    """
    kind = keras.layers.BatchNormalization
    return [each for each in model._flatten_layers() if isinstance(each, kind)]


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that a bare `optimizer.apply(gradients)` updates.

    They are kept since `build` and have no public name (Keras 3.5 to 3.15).
    """
    return list(optimizer._trainable_variables)


def hand_over_state(
    model: keras.Model,
    trainable: list[Any],
    non_trainable: list[Any],
    optimizer: list[Any],
    metrics: list[Any],
) -> None:
    """Makes arrays what a model's variables get when they are synced.

    On JAX `fit` holds the values of variables, and gives them back where a
    callback or an error ends a step: those of the step before (Keras 3.15).
    """
    model._jax_state = {
        "trainable_variables": trainable,
        "non_trainable_variables": non_trainable,
        "optimizer_variables": optimizer,
        "metrics_variables": metrics,
    }
    model._jax_state_synced = False


def asked_by(name: str, model: keras.Model) -> bool:
    """Whether the caller's caller is the method `name` of `model`.

    `fit` asks the model for its metrics once an epoch, right after the last
    batch (also when a callback stopped the epoch) and before validation and
    `on_epoch_end`. `evaluate` asks too, from the same helper, so only the stack
    tells them apart (`_get_metrics_result_or_logs`, Keras 3.5 to 3.15).
    """
    frame: FrameType | None = sys._getframe(2)
    if frame and frame.f_code.co_name == "_get_metrics_result_or_logs":
        frame = frame.f_back
    return _is_method(frame, name, model)


def is_inside_fit(model: keras.Model) -> bool:
    """Whether the caller's caller was itself called while `model` fits.

    A callback may train the model on a batch of its own. A `fit` that asks is
    a new one: what went before it was interrupted. Only the stack knows.
    """
    frame: FrameType | None = sys._getframe(2)
    if _is_method(frame, "fit", model):
        return False
    return any(_is_method(f, "fit", model) for f in _upwards(frame))


def is_fit_inside_fit(model: keras.Model) -> bool:
    """Whether the caller's caller is a `fit` of `model` that another called.

    A `fit` of a subclass that calls Keras's is the same one.
    """
    frame: FrameType | None = sys._getframe(2)
    if frame is None or not _is_method(frame, "fit", model):
        return False
    outer = _upwards(frame.f_back)
    fits = (f for f in outer if _is_method(f, "fit", model))
    return any(fit.f_code is frame.f_code for fit in fits)


def callbacks_of_fit() -> list[keras.callbacks.Callback]:
    """The callbacks of the `fit` that calls a callback's hook.

    A callback is not told of the others (Keras 3.5 to 3.15).
    """
    for frame in _upwards(sys._getframe(1)):
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.callbacks.CallbackList):
            return list(owner.callbacks)
    return []


def _upwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_method(frame: FrameType | None, name: str, model: Any) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == name
        and frame.f_locals.get("self") is model
    )
