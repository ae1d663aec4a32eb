"""Every name of Keras that is not public, each with the reason it is needed."""

from __future__ import annotations

import sys
from typing import Any

import keras

# Where a loss is reduced to a number: the only place that sees the per-example
# values, the sample weights and the mask together (Keras 3.5 to 3.15).
from keras.src.losses import loss as loss_module

__all__ = [
    "asked_by_fit",
    "compiled_loss",
    "is_inside_fit",
    "loss_module",
    "variables_of",
]


def compiled_loss(model: keras.Model) -> Any:
    """The object that `compile(loss=...)` made, or `None`.

    `model.loss` is what the user passed; the object that calls it has no public
    name (Keras 3.5 to 3.15).
    """
    return model._compile_loss


def variables_of(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The variables that a bare `optimizer.apply(gradients)` updates.

    They are kept since `build` and have no public name (Keras 3.5 to 3.15).
    """
    return list(optimizer._trainable_variables)


def asked_by_fit() -> bool:
    """Whether the caller of the caller is Keras's `fit`.

    `fit` asks the model for its metrics once an epoch, right after the last
    batch (also when a callback stopped the epoch) and before validation and
    `on_epoch_end`. `evaluate` asks too, from the same helper, so only the stack
    tells them apart (`_get_metrics_result_or_logs`, Keras 3.5 to 3.15).
    """
    asking = sys._getframe(2)
    if asking.f_code.co_name == "_get_metrics_result_or_logs":
        asking = asking.f_back or asking
    return asking.f_code.co_name == "fit"


def is_inside_fit(model: keras.Model) -> bool:
    """Whether the caller of the caller was itself called while `model` fits.

    A callback may train the model on a batch of its own. A `fit` that asks is
    a new one: what went before it was interrupted. Only the stack knows.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name == "fit":
        return False
    while frame.f_back is not None:
        frame = frame.f_back
        is_fit = frame.f_code.co_name == "fit"
        if is_fit and frame.f_locals.get("self") is model:
            return True
    return False
