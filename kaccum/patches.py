"""Attributes that are replaced for a while and always put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_ABSENT = object()


class Patch:
    """Shadows the attribute `name` of `owner` by `value`.

    Writes to the instance's dictionary: Keras and TensorFlow track whatever is
    assigned to the attributes of their objects, and would save it.

    Args:
        owner: The object whose attribute is shadowed.
        name: The attribute's name.
        value: What stands there while the patch is installed.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._attributes = vars(owner)
        self._name = name
        self._value = value
        self._previous: Any = _ABSENT

    @property
    def is_installed(self) -> bool:
        """Whether the attribute is this patch's value now."""
        return self._attributes.get(self._name) is self._value

    def install(self) -> None:
        """Puts the value in place."""
        self._previous = self._attributes.get(self._name, _ABSENT)
        self._attributes[self._name] = self._value

    def remove(self) -> None:
        """Puts back what was there, unless someone else replaced it since."""
        if not self.is_installed:
            return
        if self._previous is _ABSENT:
            del self._attributes[self._name]
        else:
            self._attributes[self._name] = self._previous


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


class SharedPatch(contextlib.AbstractContextManager["SharedPatch"]):
    """Replaces an attribute of a module or class while anyone needs it.

    One replacement serves every thread: models trained at the same time may
    enter and leave in any order.

    Args:
        owner: The module or class.
        name: The attribute's name.
        value: What stands there inside of `with` blocks.
    """

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner = owner
        self._name = name
        self._value = value
        self._previous = getattr(owner, name)
        self._is_inherited = name not in vars(owner)
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> SharedPatch:
        with self._lock:
            self._users += 1
            setattr(self._owner, self._name, self._value)
        return self

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._is_inherited:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._previous)
