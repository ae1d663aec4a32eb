"""The weight of a micro-batch: the denominator of its own mean loss.

Listens to the losses that `compile` was given while a training step runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from kaccum.keras_private import loss_module

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Denominator(NamedTuple):
    """What a loss divided by.

    Args:
        value: Scalar float32 tensor, or `None` for a loss that is a sum.
    """

    value: Any


_listening = threading.local()
_lock = threading.Lock()
_open_hearings = 0


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Makes losses report to `listen_to` while the `with` block runs.

    One replacement serves every thread: models trained at the same time may
    enter and leave in any order.
    """
    global _open_hearings
    with _lock:
        _open_hearings += 1
        if _open_hearings == 1:
            loss_module.reduce_weighted_values = _reduce_and_report
    try:
        yield
    finally:
        with _lock:
            _open_hearings -= 1
            if _open_hearings == 0:
                loss_module.reduce_weighted_values = _reduce_weighted_values


@contextlib.contextmanager
def listen_to(denominators: list[Denominator]) -> Iterator[None]:
    """Appends to `denominators` for every loss that this thread computes."""
    previous = getattr(_listening, "denominators", None)
    _listening.denominators = denominators
    try:
        yield
    finally:
        _listening.denominators = previous


def weight_of(denominators: list[Denominator], examples: Any) -> Any:
    """The weight of a micro-batch.

    Where a micro-batch's loss is `sum(values) / denominator`, the large batch's
    loss is the sum of all micro-batches' `sum(values)` over the sum of their
    denominators, so the denominator is the weight.

    Args:
        denominators: What the micro-batch's losses divided by, in order. With
            several outputs the first one that is a mean counts.
        examples: Scalar float32 tensor, the number of examples: the weight
            where no loss was heard.

    Returns:
        Scalar float32 tensor, or `None` where all losses are sums, which add
        up undivided.

    Raises:
        ValueError: If some losses are sums and others means, which no single
            weight can serve.
    """
    if not denominators:
        return examples
    means = [d.value for d in denominators if d.value is not None]
    if not means:
        return None
    if len(means) < len(denominators):
        raise ValueError(
            "The losses of one model must either all be means or all be sums "
            "for their gradients to be accumulated exactly. Received: "
            f"{len(means)} losses with a mean reduction and "
            f"{len(denominators) - len(means)} with `reduction=\"sum\"`. Use "
            "one kind of reduction, and `loss_weights` for the balance."
        )
    return means[0]


# Taken at import, so that a hearing can always put Keras's own function back.
_reduce_weighted_values = loss_module.reduce_weighted_values


def _reduce_and_report(
    values: Any,
    sample_weight: Any = None,
    mask: Any = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Any:
    denominators = getattr(_listening, "denominators", None)
    if denominators is not None and tuple(values.shape) != ():
        denominators.append(
            Denominator(_denominator(values, sample_weight, mask, reduction))
        )
    return _reduce_weighted_values(
        values,
        sample_weight=sample_weight,
        mask=mask,
        reduction=reduction,
        dtype=dtype,
    )


def _denominator(
    values: Any, sample_weight: Any, mask: Any, reduction: str | None
) -> Any:
    """What `keras/src/losses/loss.py` divides the sum of `values` by."""
    if reduction not in MEANS:
        return None
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
    shape = ops.convert_to_tensor(ops.shape(tensor), dtype="int32")
    return ops.cast(ops.prod(shape), "float32")


def examples_in(data: Any) -> Any:
    """The number of examples in a batch of `fit`, a scalar float32 tensor."""
    leaf = next(i for i in keras.tree.flatten(data) if i is not None)
    return ops.cast(ops.shape(leaf)[0], "float32")
