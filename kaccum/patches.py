"""Attributes that are replaced for a while and always put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_ABSENT = object()


class Patch(contextlib.AbstractContextManager["Patch"]):
    """Replaces the attribute `name` of `owner` while anyone needs it.

    One serves every thread: models trained at the same time, and the replicas
    of one, may enter and leave in any order.

    Writes to an instance's dictionary: Keras and TensorFlow track whatever is
    assigned to the attributes of their objects, and would save it.

    Args:
        owner: The object, module or class whose attribute is replaced.
        name: The attribute's name.
        stand_in: Function of what stood there that returns what stands there
            instead.
    """

    def __init__(
        self, owner: Any, name: str, stand_in: Callable[[Any], Any]
    ) -> None:
        self._owner = owner
        self._name = name
        self._make = stand_in
        self._value: Any = _ABSENT
        self._previous: Any = _ABSENT
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> Patch:
        with self._lock:
            if self._users == 0:
                self.install()
            self._users += 1
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.remove()

    @property
    def is_installed(self) -> bool:
        """Whether the attribute is this patch's value now."""
        current = vars(self._owner).get(self._name, _ABSENT)
        return current is self._value is not _ABSENT

    def install(self) -> None:
        """Puts the stand-in in place, for good."""
        self._previous = vars(self._owner).get(self._name, _ABSENT)
        self._value = self._make(getattr(self._owner, self._name))
        self._set(self._value)

    def remove(self) -> None:
        """Puts back what was there, unless someone else replaced it since."""
        if self.is_installed:
            self._set(self._previous)

    def _set(self, value: Any) -> None:
        if not isinstance(self._owner, type):
            if value is _ABSENT:
                del vars(self._owner)[self._name]
            else:
                vars(self._owner)[self._name] = value
        elif value is _ABSENT:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, value)


@contextlib.contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    """Has `patches` in place for the duration of a `with` block."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
