"""How JAX says that memory ran out."""

from __future__ import annotations

import jax

# A GPU's, and that of a compiled step on the processor (JAX 0.10).
_TEXTS = ("RESOURCE_EXHAUSTED", "Out of memory allocating")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # What was called before raises the one, what is new the other (JAX 0.10).
    if isinstance(error, (ValueError, jax.errors.JaxRuntimeError)):
        return any(text in str(error) for text in _TEXTS)
    return isinstance(error, MemoryError)


def out_of_memory(error: BaseException, sentence: str) -> BaseException:
    """The error again, with a sentence more.

    Args:
        error: One that `is_out_of_memory`.
        sentence: What to add to its message.
    """
    return jax.errors.JaxRuntimeError(f"{error}\n{sentence}")
