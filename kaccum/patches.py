"""Attributes that are replaced for a while and always put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_ABSENT = object()


class Patch:
    """Shadows the attribute `name` of `owner` by `value`.

    Writes to an instance's dictionary: Keras and TensorFlow track whatever is
    assigned to the attributes of their objects, and would save it.

    Args:
        owner: The object, module or class whose attribute is shadowed.
        name: The attribute's name.
        value: What stands there while the patch is installed.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner = owner
        self._name = name
        self._value = value
        self._previous: Any = _ABSENT

    @property
    def is_installed(self) -> bool:
        """Whether the attribute is this patch's value now."""
        return vars(self._owner).get(self._name) is self._value

    def install(self) -> None:
        """Puts the value in place."""
        self._previous = vars(self._owner).get(self._name, _ABSENT)
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
    """Installs `patches` for the duration of a `with` block."""
    try:
        for patch in patches:
            patch.install()
        yield
    finally:
        for patch in reversed(patches):
            patch.remove()


class SharedPatch(Patch, contextlib.AbstractContextManager["SharedPatch"]):
    """A patch that is in place while anyone needs it.

    One serves every thread: models trained at the same time, and the replicas
    of one, may enter and leave in any order.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        super().__init__(owner, name, value)
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> SharedPatch:
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
