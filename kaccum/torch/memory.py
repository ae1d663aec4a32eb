"""How PyTorch says that memory ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The processor's allocator has no error of its own (PyTorch 2.13).
    is_of_torch = isinstance(error, RuntimeError)
    return is_of_torch and "DefaultCPUAllocator" in str(error)


def out_of_memory(error: BaseException, sentence: str) -> BaseException:
    """The error again, with a sentence more.

    Args:
        error: One that `is_out_of_memory`.
        sentence: What to add to its message.
    """
    return torch.OutOfMemoryError(f"{error}\n{sentence}")
