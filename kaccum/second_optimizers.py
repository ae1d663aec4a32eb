"""Notices updates that a training step makes besides the model's own.

A second optimizer may be anywhere: on the model, on a part of it, in a list.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from kaccum.patches import SharedPatch

# The class that makes every optimizer's updates.
_kind = next(
    kind for kind in keras.optimizers.Optimizer.__mro__ if "apply" in vars(kind)
)
# Taken at import: Keras's own.
_apply = _kind.apply
_refusing = threading.local()


def _refuse_or_apply(
    optimizer: Any, grads: Any, trainable_variables: Any = None
) -> Any:
    refuse = getattr(_refusing, "refuse", None)
    if refuse is not None:
        refuse()
    return _apply(optimizer, grads, trainable_variables)


#: A context in which updates are told to who refuses them.
telling = SharedPatch(_kind, "apply", _refuse_or_apply)


@contextlib.contextmanager
def refused_by(refuse: Callable[[], Any]) -> Iterator[None]:
    """Calls `refuse` before each update that this thread is about to make.

    Not before those of optimizers whose own `apply` is shadowed.
    """
    previous = getattr(_refusing, "refuse", None)
    _refusing.refuse = refuse
    try:
        yield
    finally:
        _refusing.refuse = previous
