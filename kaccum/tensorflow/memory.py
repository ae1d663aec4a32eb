"""How TensorFlow says that memory ran out."""

from __future__ import annotations

import tensorflow as tf


def is_out_of_memory(
    error: BaseException, already: BaseException | None = None
) -> bool:
    """Whether memory ran out.

    Args:
        error: What was raised: a `tf.errors.ResourceExhaustedError`, a
            `MemoryError`, or what such an error was wrapped in.
        already: What was handled before, which has nothing to do with it.
    """
    return _origin(error, already) is not None


def out_of_memory(
    error: BaseException, sentence: str
) -> tf.errors.ResourceExhaustedError:
    """The error again, with a sentence more.

    Args:
        error: One that `is_out_of_memory`.
        sentence: What to add to its message.
    """
    origin = _origin(error)
    message = getattr(origin, "message", str(origin))
    return tf.errors.ResourceExhaustedError(
        getattr(origin, "node_def", None),
        getattr(origin, "op", None),
        f"{message}\n{sentence}",
    )


def _origin(
    error: BaseException | None, already: BaseException | None = None
) -> BaseException | None:
    while error is not None and error is not already:
        if isinstance(error, (tf.errors.ResourceExhaustedError, MemoryError)):
            return error
        if isinstance(error, tf.errors.OpError):
            if "RESOURCE_EXHAUSTED" in error.message:
                return error
        # Keras wraps what an eager layer raises, `from None`.
        error = error.__cause__ or error.__context__
    return None
