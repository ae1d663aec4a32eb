"""The weight of a micro-batch: the denominator of its own mean loss.

Listens to the losses that `compile` was given while a training step runs. Has
each replica compute the loss of its own micro-batch, as a single device would.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from kaccum.backend import engine
from kaccum.keras_private import loss_module
from kaccum.patches import SharedPatch

# The weight of a micro-batch whose mean is of nothing, say all masked. Its loss
# still has the terms that do not depend on the data, which a window of such
# micro-batches must not lose. Beside any other weight it is below rounding.
OF_NOTHING = 2.0**-40

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Denominator(NamedTuple):
    """What a loss divided by.

    Args:
        kind: "mean", "sum", "none" (a loss without reduction), or "hidden" (a
            function of the user's own that returns a scalar).
        value: For a mean the engine's note of a scalar, else `None`.
    """

    kind: str
    value: Any = None


_listening = threading.local()


@contextlib.contextmanager
def listen_to(denominators: list[Denominator]) -> Iterator[None]:
    """Appends to `denominators` for every loss that this thread computes."""
    previous = vars(_listening).copy()
    _listening.denominators, _listening.depth = denominators, 0
    try:
        yield
    finally:
        vars(_listening).clear()
        vars(_listening).update(previous)


@contextlib.contextmanager
def of_one_replica() -> Iterator[None]:
    """Has this thread's losses not be divided by the number of replicas."""
    previous = getattr(_listening, "is_undivided", False)
    _listening.is_undivided = True
    try:
        yield
    finally:
        _listening.is_undivided = previous


def weight_of(
    denominators: list[Denominator],
    count_examples: Callable[[], Any],
    *,
    is_plain: bool,
) -> Any:
    """The weight of a micro-batch.

    Where a micro-batch's loss is `sum(values) / denominator`, the large batch's
    loss is the sum of all micro-batches' `sum(values)` over the sum of their
    denominators, so the denominator is the weight.

    Args:
        denominators: What the micro-batch's losses divided by, in order. With
            several outputs the first one that is not a sum counts.
        count_examples: Function that returns the number of examples, a float
            or a scalar float32 tensor: the weight where the denominator is not
            known.
        is_plain: Whether the losses are just added up, as Keras does. What a
            user's code makes of a loss without reduction is hidden.

    Returns:
        Float or scalar float32 tensor, or `None` where all losses are sums,
        which add up undivided.

    Raises:
        ValueError: If some losses are sums and others means, which no single
            weight can serve.
    """
    sums = ("sum", "none") if is_plain else ("sum",)
    others = [d for d in denominators if d.kind not in sums]
    if denominators and not others:
        return None
    if len(others) < len(denominators):
        raise ValueError(
            "The losses of one model must either all be means or all be sums "
            "for their gradients to be accumulated exactly. Received: "
            f"{len(others)} losses with a mean reduction and "
            f"{len(denominators) - len(others)} with `reduction=\"sum\"`. Use "
            "one kind of reduction, and `loss_weights` for the balance."
        )
    if others and others[0].value is not None:
        return engine().noted(others[0].value)
    return count_examples()


# Taken at import: Keras's own.
_reduce_weighted_values = loss_module.reduce_weighted_values
_call = loss_module.Loss.__call__
_scale = loss_module.scale_loss_for_distribution
_unscale = loss_module.unscale_loss_for_distribution


def _call_one_deeper(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A loss may call others: what those divide by is its own business."""
    _listening.depth = getattr(_listening, "depth", 0) + 1
    try:
        return _call(self, *args, **kwargs)
    finally:
        _listening.depth -= 1


def _reduce_and_report(
    values: Any,
    sample_weight: Any = None,
    mask: Any = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Any:
    denominators = getattr(_listening, "denominators", None)
    if denominators is not None and _listening.depth == 1:
        if engine().can_hear():
            denominators.append(
                _denominator(values, sample_weight, mask, reduction)
            )
    return _reduce_weighted_values(
        values,
        sample_weight=sample_weight,
        mask=mask,
        reduction=reduction,
        dtype=dtype,
    )


def _is_undivided() -> bool:
    return getattr(_listening, "is_undivided", False)


def _divide(value: Any) -> Any:
    return value if _is_undivided() else _scale(value)


def _multiply(value: Any) -> Any:
    return value if _is_undivided() else _unscale(value)


_reduction = SharedPatch(
    loss_module, "reduce_weighted_values", _reduce_and_report
)
_calls = SharedPatch(loss_module.Loss, "__call__", _call_one_deeper)
_scaling = SharedPatch(loss_module, "scale_loss_for_distribution", _divide)
_unscaling = SharedPatch(
    loss_module, "unscale_loss_for_distribution", _multiply
)


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Makes losses report to `listen_to` while the `with` block runs."""
    with _reduction, _calls, _scaling, _unscaling:
        yield


def _denominator(
    values: Any, sample_weight: Any, mask: Any, reduction: str | None
) -> Denominator:
    """What `keras/src/losses/loss.py` divides the sum of `values` by."""
    if tuple(values.shape) == ():
        return Denominator("hidden")
    if reduction not in MEANS:
        return Denominator("sum" if reduction == "sum" else "none")
    value = _mean_denominator(values, sample_weight, mask, reduction)
    if isinstance(value, float):
        value = value or OF_NOTHING
    else:
        value = ops.where(ops.equal(value, 0.0), OF_NOTHING, value)
        value = ops.cast(value, "float32")
    return Denominator("mean", engine().note(value))


def _mean_denominator(
    values: Any, sample_weight: Any, mask: Any, reduction: str | None
) -> Any:
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, dtype="float32")
    if reduction == "mean_with_sample_weight":
        weights = loss_module.apply_mask(
            sample_weight, mask, dtype="float32", reduction=reduction
        )
        return _size(values) if weights is None else ops.sum(weights)
    if sample_weight is not None:
        # The weights may be of higher rank than the values they multiply.
        values, sample_weight = loss_module.squeeze_or_expand_to_same_rank(
            values, sample_weight
        )
        values = ops.cast(values, "float32") * sample_weight
    size = _size(values)
    if mask is None:
        return size
    # Keras spreads the masked elements' share over the others (`apply_mask`).
    unmasked = ops.sum(ops.cast(mask, "float32"))
    return size * unmasked / _size(mask)


def _size(tensor: Any) -> Any:
    """The number of elements, a float if it is known beforehand."""
    if None not in tuple(tensor.shape):
        return float(math.prod(tensor.shape))
    shape = ops.convert_to_tensor(ops.shape(tensor), dtype="int32")
    return ops.cast(ops.prod(shape), "float32")


def examples_in(data: Any) -> Any:
    """The number of examples in a batch of `fit`.

    Args:
        data: What a `train_step` gets. Its first array that is not a scalar
            has the examples along its first axis.

    Returns:
        A float, or a scalar float32 tensor where it is not known beforehand.

    Raises:
        ValueError: If there is no such array.
    """
    for leaf in keras.tree.flatten(data):
        if leaf is not None and len(leaf.shape) > 0:
            count = leaf.shape[0]
            if count is not None:
                return float(count)
            return ops.cast(ops.shape(leaf)[0], "float32")
    raise ValueError(
        "A batch must hold an array whose first axis is the examples, to "
        f"count them. Received: {keras.tree.map_structure(type, data)}."
    )
