"""The weight of a micro-batch: the denominator of its own mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

# Where a loss is reduced to a number: the only place that sees the per-example
# values, the sample weights and the mask together (Keras 3.5 to 3.15).
from keras.src.losses import loss as loss_module

from kaccum.sums.gradients import OF_NOTHING

SUMS = ("sum", "none")
MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Reduction(NamedTuple):
    """How a loss became a number.

    Args:
        kind: "mean", "sum", "none" (a loss without reduction), or "hidden" (a
            function of the user's own that returns a scalar).
        denominator: What a mean divided by, a float or a scalar float32 tensor,
            else `None`.
        is_of_data: Whether that depends on a mask, or on sample weights.
    """

    kind: str
    denominator: Any = None
    is_of_data: bool = False


def reduction_of(
    values: Any,
    sample_weight: Any,
    mask: Any,
    reduction: str | None,
    *,
    is_sum: bool = False,
) -> Reduction:
    """What `keras/src/losses/loss.py` divides the sum of `values` by.

    Args:
        values: The per-example losses.
        sample_weight: Their weights, or `None`.
        mask: Which of them count, or `None`.
        reduction: That of the loss.
        is_sum: Whether the loss is known to be a sum.
    """
    if is_sum:
        return Reduction("sum")
    if tuple(values.shape) == ():
        return Reduction("hidden")
    if reduction not in MEANS:
        return Reduction("sum" if reduction == "sum" else "none")
    denominator = _denominator(values, sample_weight, mask, reduction)
    if isinstance(denominator, float):
        return Reduction("mean", denominator or OF_NOTHING)
    is_nothing = ops.equal(denominator, 0.0)
    denominator = ops.where(is_nothing, OF_NOTHING, denominator)
    of_weights = reduction == "mean_with_sample_weight"
    is_of_data = mask is not None or (of_weights and sample_weight is not None)
    return Reduction("mean", ops.cast(denominator, "float32"), is_of_data)


def proportions(reductions: Sequence[Reduction], data: Any) -> list[Any]:
    """The denominators of several means, if they depend on the data.

    Args:
        reductions: How the micro-batch's losses became numbers.
        data: The micro-batch.

    Returns:
        Scalars, with zeros for those of nothing; nothing where one weight is
        right for all of them.
    """
    means = [each for each in reductions if each.kind in ("mean", "hidden")]
    if len(means) < 2 or not any(each.is_of_data for each in means):
        return []
    values = [
        examples_in(data) if each.denominator is None else each.denominator
        for each in means
    ]
    values = [ops.cast(value, "float32") for value in values]
    return [ops.where(ops.equal(v, OF_NOTHING), 0.0, v) for v in values]


def weight_of(
    reductions: Sequence[Reduction],
    data: Any,
    *,
    are_added_up: bool,
    are_mixed: bool = False,
) -> Any:
    """The weight of a micro-batch.

    Where a micro-batch's loss is `sum(values) / denominator`, the large batch's
    loss is the sum of all micro-batches' `sum(values)` over the sum of their
    denominators, so the denominator is the weight.

    Args:
        reductions: How the micro-batch's losses became numbers, in order. With
            several outputs the first one that is not a sum counts.
        data: The micro-batch. Its number of examples is the weight where the
            denominator is not known.
        are_added_up: Whether the losses are just added up, as Keras does. What
            a user's code makes of a loss without reduction is hidden.
        are_mixed: Whether sums beside means are kept apart: the weight is that
            of the means.

    Returns:
        Float or scalar float32 tensor, or `None` where all losses are sums,
        which add up undivided.

    Raises:
        ValueError: If some losses are sums and others means, which no single
            weight can serve.
    """
    sums = SUMS if are_added_up else ("sum",)
    others = [each for each in reductions if each.kind not in sums]
    if reductions and not others:
        return None
    if len(others) < len(reductions) and not are_mixed:
        raise ValueError(
            "The losses of one model, with those of `add_loss`, must either "
            "all be means or all be sums for their gradients to be accumulated "
            f"exactly. Received: {len(others)} losses that are means, and "
            f"{len(reductions) - len(others)} that are sums. Use one kind of "
            "reduction, and `loss_weights` for the balance."
        )
    if others and others[0].denominator is not None:
        return others[0].denominator
    return examples_in(data)


def said(weight: Callable[..., Any], data: Any) -> Any:
    """The weight of a micro-batch that a function of the user's own computes.

    Args:
        weight: Function of `(x, y, sample_weight)` that returns a scalar.
        data: The micro-batch.

    Returns:
        Scalar float32 tensor.

    Raises:
        ValueError: If it returns something else.
    """
    value = weight(*keras.utils.unpack_x_y_sample_weight(data))
    value = ops.cast(ops.convert_to_tensor(value), "float32")
    if tuple(value.shape) != ():
        raise ValueError(
            "The function `weight` must return a number, or a scalar tensor. "
            f"Received: a tensor of shape {tuple(value.shape)}."
        )
    return ops.where(ops.equal(value, 0.0), OF_NOTHING, value)


def examples_in(data: Any) -> Any:
    """The number of examples in a batch of `fit`.

    Args:
        data: What a `train_step` gets. The first array of its targets, or of
            all of it where there are none, has the examples along its first
            axis. (An input may have others: the nodes of a batch of graphs.)

    Returns:
        A float, or a scalar float32 tensor where it is not known beforehand.

    Raises:
        ValueError: If there is no such array.
    """
    has_targets = isinstance(data, (tuple, list)) and len(data) in (2, 3)
    targets = data[1] if has_targets else None
    for leaf in keras.tree.flatten([targets, data]):
        if leaf is not None and len(leaf.shape) > 0:
            count = leaf.shape[0]
            if count is not None:
                return float(count)
            return ops.cast(ops.shape(leaf)[0], "float32")
    raise ValueError(
        "A batch must hold an array whose first axis is the examples, to "
        f"count them. Received: {keras.tree.map_structure(type, data)}."
    )


def _denominator(
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
