"""Tensors of kaccum's own, which take no memory while they hold zeros."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from keras.src.backend.torch.core import get_device, to_torch_dtype


class Sum:
    """A number or tensor of kaccum's own, zeros at first.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        beside: A Keras variable whose device it shares, and whose gradients it
            is of; or `None`.
    """

    def __init__(self, shape: Any, dtype: str, beside: Any) -> None:
        self.shape = tuple(shape)
        self.dtype: torch.dtype = to_torch_dtype(dtype)
        #: The weight, or `None`.
        self.parameter: Any = None if beside is None else beside.value
        if self.parameter is not None:
            self.device = self.parameter.device
        else:
            # The host asks for counts.
            self.device = "cpu" if dtype == "int32" else get_device()
        self._is_lent = False
        #: What it holds; `None` for zeros.
        self.value: torch.Tensor | None = None

    def zeros(self) -> torch.Tensor:
        """Zeros of its shape, on its device."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def copy(self) -> torch.Tensor:
        """What it holds."""
        return self.zeros() if self.value is None else self.value.clone()

    def take(self) -> torch.Tensor:
        """What it holds, whose memory is then no longer its own."""
        value, self.value = self.value, None
        return self.zeros() if value is None else value

    def lend(self) -> None:
        """Has `backward` add to it, unless it has added something already."""
        if self.parameter is not None and self.parameter.grad is None:
            self.parameter.grad = self.value
            self._is_lent = True

    def take_back(self, gradient: torch.Tensor) -> bool:
        """Takes what `backward` made of it, if it was lent.

        Nobody else is to add to that, or to clear it.
        """
        is_lent, self._is_lent = self._is_lent, False
        if not is_lent or gradient.layout != torch.strided:
            return False
        self.value, self.parameter.grad = gradient, None
        return True

    def clear(self) -> None:
        """Makes it hold zeros."""
        if self._is_lent:
            self._is_lent, self.parameter.grad = False, None
        self.value = None


def lend(sums: Sequence[Sum]) -> None:
    """Has `backward` add to sums, but for those of a parameter of several."""
    times = collections.Counter(id(total.parameter) for total in sums)
    for total in sums:
        if times[id(total.parameter)] == 1:
            total.lend()


@torch.no_grad()
def add(sums: Sequence[Sum], gradients: Sequence[Any], weight: Any) -> None:
    """`total += weight * gradient`, for each that was not lent."""
    is_plain = isinstance(weight, float) and weight == 1.0
    rest = [
        (total, gradient)
        for total, gradient in zip(sums, gradients)
        if not (is_plain and total.take_back(gradient))
    ]
    if not rest:
        return
    totals = [total for total, _ in rest]
    dtyped = [gradient.to(total.dtype) for total, gradient in rest]
    if isinstance(weight, torch.Tensor):
        # Its number would have to come from the device.
        dtyped, weight = torch._foreach_mul(dtyped, weight.detach()), 1.0
    held = [total.value for total in totals]
    if all(value is not None for value in held):
        torch._foreach_add_(held, dtyped, alpha=weight)
        return
    for total, gradient in zip(totals, dtyped):
        if total.value is None:
            total.value = gradient.to_dense() * weight
        else:
            total.value.add_(gradient, alpha=weight)
