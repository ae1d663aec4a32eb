"""How TensorFlow says that memory ran out."""

from __future__ import annotations

import tensorflow as tf


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
        return True
    is_of_tensorflow = isinstance(error, tf.errors.OpError)
    return is_of_tensorflow and "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(
    error: BaseException, sentence: str
) -> tf.errors.ResourceExhaustedError:
    """The error again, with a sentence more.

    Args:
        error: One that `is_out_of_memory`.
        sentence: What to add to its message.
    """
    message = getattr(error, "message", str(error))
    return tf.errors.ResourceExhaustedError(
        getattr(error, "node_def", None),
        getattr(error, "op", None),
        f"{message}\n{sentence}",
    )
