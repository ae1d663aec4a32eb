"""Arithmetic on sums and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch


def new_sum(shape: Any, dtype: str, beside: Any = None) -> torch.Tensor:
    """Zeros.

    Args:
        shape: Their shape.
        dtype: Their dtype.
        beside: A variable whose device they share.
    """
    zeros = keras.ops.zeros(tuple(shape), dtype)
    if beside is not None:
        return zeros.to(beside.value.device)
    # The host asks for counts.
    return zeros.to("cpu") if dtype == "int32" else zeros


def is_reachable(tensor: Any) -> bool:
    """Whether a scalar can be used here."""
    return True


def value_of(total: torch.Tensor) -> torch.Tensor:
    """What a sum holds now."""
    return total.clone()


def take(total: torch.Tensor) -> torch.Tensor:
    """What a sum holds, to be computed with in its own memory."""
    return total


def copy(variable: Any) -> torch.Tensor:
    """What a Keras variable holds now."""
    return variable.value.detach().clone()


@torch.no_grad()
def restore(variable: Any, before: torch.Tensor) -> None:
    """Makes a Keras variable hold what `copy` returned."""
    variable.value.copy_(before)


def increase(total: torch.Tensor, value: Any) -> None:
    """`total += value`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to(total.device, total.dtype)
    total += value


@torch.no_grad()
def take_larger(total: torch.Tensor, value: Any) -> None:
    """`total = max(total, value)`."""
    torch.maximum(total, value.to(total.dtype), out=total)


@torch.no_grad()
def add_weighted(
    sums: Sequence[torch.Tensor], gradients: Sequence[Any], weight: Any
) -> None:
    """`total += weight * gradient`, in one pass over memory for a number."""
    if not sums:
        return
    dtyped = [g.to(total.dtype) for g, total in zip(gradients, sums)]
    if isinstance(weight, torch.Tensor):
        # Its number would have to come from the device.
        dtyped = torch._foreach_mul(dtyped, weight.detach())
        torch._foreach_add_(sums, dtyped)
    else:
        torch._foreach_add_(sums, dtyped, alpha=weight)


def divided(tensors: Sequence[Any], by: Any) -> list[Any]:
    """The tensors divided by a scalar, in their own memory.

    Zeros where that is zero.
    """
    for dtype in {tensor.dtype for tensor in tensors}:
        share = torch.where(by == 0, 0, 1 / by.to(dtype))
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        torch._foreach_mul_(alike, share)
    return list(tensors)


def empty(total: torch.Tensor, after: Any = None) -> None:
    """Makes a sum zero, also one that was released."""
    total.untyped_storage().resize_(total.numel() * total.element_size())
    # Overwritten, not multiplied: it may hold a NaN.
    total.zero_()


def release(total: torch.Tensor) -> None:
    """Frees a sum's memory."""
    total.untyped_storage().resize_(0)


def is_eager() -> bool:
    """Whether what is called now is run now."""
    return True


def is_traced_in(outer: None) -> bool:
    """Whether what is called now belongs to the step."""
    return True


def outside_of_traces(make: Callable[[], Any]) -> Any:
    """What `make` returns."""
    return make()


@contextlib.contextmanager
def positive(total: Any, message: str) -> Iterator[None]:
    """A context that is entered only where `total > 0`.

    Raises:
        RuntimeError: Elsewhere.
    """
    if not int(total) > 0:
        raise RuntimeError(message)
    yield


@torch.enable_grad()
def gradients_of(
    loss: Callable[[], Any], variables: Sequence[Any]
) -> list[Any]:
    """The gradients of what `loss` returns, a tensor or `None` each."""
    values = [variable.value for variable in variables]
    return list(torch.autograd.grad(loss(), values, allow_unused=True))


def use_full_precision() -> None:
    """Makes products as precise as their dtypes."""
    torch.set_float32_matmul_precision("highest")


def device_name() -> str:
    """The device that Keras computes on by default."""
    device = keras.ops.zeros(()).device.type
    return device if device != "cpu" else "CPU (not run on a GPU)"


def train_step_of(model: keras.Model) -> Callable[[Any], Any]:
    """A model's training step: a function of what `fit` gives it."""
    step: Callable[[Any], Any] = model.train_step
    return step
