"""What is refused, before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, Union

import keras
import numpy as np

from kaccum.backends import backend

Weight = Union[Literal["sum"], Callable[[Any, Any, Any], Any], None]


def received(name: str, value: Any) -> str:
    """The sentence that says what an argument was, and what to write."""
    text = f"Received: {name}={value!r} ({type(value).__name__})."
    is_whole = isinstance(value, float) and value.is_integer()
    if is_whole and name in ("steps", "micro_batch_size"):
        text += " A division that is to give an integer is written `//`."
    if name == "steps" and value == "auto":
        text += ' Write `micro_batch_size="auto"`.'
    return text


def checked_integer(
    value: Any, rule: str, received: str, least: int = 1
) -> int:
    """An argument as an int.

    Raises:
        TypeError, ValueError: If it is not an integer >= `least`, with the
            sentences `rule` and `received`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{rule} {received}")
    if value < least:
        raise ValueError(f"{rule} {received}")
    return int(value)


def check_flag(name: str, value: Any) -> None:
    """Checks that an argument is a bool.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. {received(name, value)}"
        )


def check_model(model: keras.Model) -> None:
    """Checks that the gradients of a model can be accumulated.

    Raises:
        TypeError: If it is no model.
        ValueError: If it is not compiled, has no optimizer, or one that
            accumulates itself.
        RuntimeError: If it trains on devices that are not supported.
    """
    if type(model).__module__.split(".")[0] == "tf_keras" or any(
        kind.__module__.split(".")[0] == "tf_keras"
        for kind in type(model).__mro__
    ):
        raise TypeError(
            "`model` must be a `keras.Model` of Keras 3. Received: a "
            f"{type(model).__name__} of the legacy package `tf_keras`. Build "
            "it with `import keras`, and without `TF_USE_LEGACY_KERAS`."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. {received('model', model)}"
        )
    if not model.compiled:
        raise ValueError(
            "The model must be compiled to accumulate gradients. Received: a "
            f"{type(model).__name__} that is not. Call `compile` first."
        )
    backend().check_devices(model)
    if model.optimizer is None:
        raise ValueError(
            "The model must have an optimizer to accumulate gradients for. "
            "Received: optimizer=None. Pass one to `compile`."
        )
    check_optimizer(model.optimizer)


def check_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Checks that an optimizer can be given the gradients of whole windows.

    Raises:
        TypeError: If it is none of Keras's.
        ValueError: If it accumulates gradients itself.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a `keras.optimizers.Optimizer`. "
            f"{received('optimizer', optimizer)}"
        )
    for each in with_inner(optimizer):
        steps = getattr(each, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                "The optimizer must not accumulate gradients itself. Received: "
                f"{type(each).__name__} with gradient_accumulation_steps="
                f"{steps}. Leave that argument out, and have schedules count "
                "updates."
            )


def check_weight(weight: Weight) -> None:
    """Checks what a user says of the weight of a micro-batch.

    Raises:
        TypeError, ValueError: If it is neither `None`, "sum", nor a function.
    """
    rule = (
        '`weight` must be "sum", or a function of `(x, y, sample_weight)` that '
        "returns what the loss of a micro-batch divides by."
    )
    if isinstance(weight, str) and weight != "sum":
        raise ValueError(f"{rule} {received('weight', weight)}")
    if not (weight is None or weight == "sum" or callable(weight)):
        raise TypeError(f"{rule} {received('weight', weight)}")
    if callable(weight):
        check_calls("weight", weight, None, None, None)


def check_calls(name: str, function: Any, *arguments: Any) -> None:
    """Checks that a function of a user's own can be called as it will be.

    Raises:
        TypeError: If it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some built-in functions do not tell.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        count = len(arguments)
        raise TypeError(
            f"The function `{name}` must take {count} "
            f"{'argument' if count == 1 else 'arguments'}. Received: one that "
            f"takes {signature}."
        ) from error


def check_gradient(gradient: Any, variable: Any) -> None:
    """Checks that a gradient can be that of a variable.

    Raises:
        TypeError: If they are swapped.
        ValueError: If it has another shape.
    """
    is_swapped = isinstance(gradient, keras.Variable)
    if is_swapped and not isinstance(variable, keras.Variable):
        raise TypeError(
            "`add` must be called with gradients and then variables. Received: "
            "them the other way round. Write `add(gradients, variables, "
            "weight=...)`."
        )
    shape = getattr(gradient, "shape", None)
    if shape is None or None in tuple(shape):
        return
    if tuple(shape) != tuple(variable.shape):
        path = getattr(variable, "path", variable.name)
        raise ValueError(
            "A gradient must have the shape of its variable. Received: one of "
            f"shape {tuple(shape)} for {path!r}, of shape "
            f"{tuple(variable.shape)}."
        )


def is_scaling_losses(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether a `LossScaleOptimizer` is at work."""
    kind = keras.optimizers.LossScaleOptimizer
    return any(isinstance(each, kind) for each in with_inner(optimizer))


def scale_of_losses(optimizer: keras.optimizers.Optimizer) -> Any:
    """What an optimizer multiplies the loss by, and divides gradients by.

    Returns:
        A float, a scalar tensor, or `None`.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if not optimizer.built:
            return optimizer.initial_scale
        return keras.ops.convert_to_tensor(optimizer.dynamic_scale)
    return getattr(optimizer, "loss_scale_factor", None)


def with_inner(optimizer: Any) -> list[Any]:
    """An optimizer and those it wraps."""
    inner = list(getattr(optimizer, "optimizers", []))
    if hasattr(optimizer, "inner_optimizer"):
        inner.append(optimizer.inner_optimizer)
    return [optimizer, *(o for i in inner for o in with_inner(i))]


def check_whole_batch_loss(
    whole_batch_loss: Any, weight: Any, skip_nonfinite: Any
) -> None:
    """Checks the argument, and what it excludes.

    Raises:
        TypeError: If it is no bool.
        ValueError: If it is given with another argument that it excludes.
    """
    check_flag("whole_batch_loss", whole_batch_loss)
    if whole_batch_loss and weight is not None:
        raise ValueError(
            "`weight` must not be given with `whole_batch_loss=True`, where "
            "the loss is computed of the whole batch and micro-batches have no "
            f"weight. {received('weight', weight)}"
        )
    if whole_batch_loss and skip_nonfinite:
        raise ValueError(
            "`skip_nonfinite` must not be given with `whole_batch_loss=True`: "
            "a NaN in one micro-batch is in the one loss of the window, and so "
            "in all its gradients. Received: both. Leave one of them out."
        )


def check_step_for_whole_batches(model: keras.Model) -> None:
    """Checks that a model's loss can be computed apart from its outputs.

    Raises:
        ValueError: If its `train_step` is not Keras's own.
        RuntimeError: If it trains on several replicas.
    """
    step = getattr(model.train_step, "__func__", None)
    if step is not keras.Model.train_step:
        raise ValueError(
            "`whole_batch_loss` must be used with Keras's own `train_step`: "
            "one of your own cannot be taken apart into outputs and loss. "
            f"Received: a {type(model).__name__} with a `train_step`. Move "
            "what it does into `compute_loss`, which is called for the whole "
            "batch."
        )
    if backend().replicas_of(model) > 1:
        raise RuntimeError(
            "`whole_batch_loss` must be used on one replica: outputs are not "
            "gathered from several ones. Received: a model of "
            f"{backend().replicas_of(model)} replicas. Use one device, or "
            "`keras.distribution` on JAX."
        )
