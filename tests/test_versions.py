"""The tests pass on the oldest, the newest and the nightly versions."""

import contextlib
import re
import sys

import keras
import numpy as np
import pytest

import kaccum.versions
from tests import versions
from tests.backends import BACKEND
from tests.profiles import nightly


@nightly
@pytest.mark.parametrize("case", versions.CASES)
def test_the_tests_pass_on_other_versions(case):
    """Each in a fresh environment, with the default profile."""
    row, have_passed = versions.run(case, BACKEND)
    assert have_passed, row


@pytest.mark.parametrize("backend", versions.BACKENDS)
@pytest.mark.parametrize("case", versions.CASES)
def test_a_case_says_what_to_install(case, backend):
    """A Python and what its pip is told: one backend, and Keras once."""
    python, steps = versions.steps_of(case, backend)
    text = " ".join(steps[0])
    assert python and "pytest" in text and f" {backend}" in text
    for other in set(versions.BACKENDS) - {backend}:
        assert other not in text
    if case == "oldest":
        assert text.count("==") == 3 and ">=" not in text


def oldest_on(backend):
    """What the package says it needs on a backend."""
    return {**kaccum.versions.OLDEST, **kaccum.versions.OLDEST_ON[backend]}


def test_the_oldest_versions_are_those_of_setup_cfg():
    """They are written there for pip, and in the package for its check."""
    for backend in versions.BACKENDS:
        text = " ".join(versions.needed(backend))
        written = dict(re.findall(r"(\w+)>=(\S+)", text))
        assert written == oldest_on(backend)
    for extra in ("demo", "test", "notebooks", "docs"):
        text = versions.EXTRAS[extra]
        (found,) = re.findall("tensorflow>=(.*)", text)
        assert found == oldest_on("tensorflow")["tensorflow"]


@pytest.mark.parametrize("module", [keras, np, sys.modules[BACKEND]])
@pytest.mark.parametrize(
    "version, is_old", [("0.0.9", True), ("99.0.dev2026", False)]
)
def test_what_is_too_old_is_told_at_import(
    monkeypatch, module, version, is_old
):
    """In one sentence that says which version is needed."""
    monkeypatch.setattr(module, "__version__", version)
    if not is_old:
        kaccum.versions.check()
        return
    name = module.__name__
    with pytest.raises(
        ImportError,
        match=f"^kaccum needs {name} {oldest_on(BACKEND)[name]} or newer where "
        f"Keras runs on {BACKEND}, but {name} 0.0.9 is installed: upgrade the "
        "package that brings it.$",
    ):
        kaccum.versions.check()


@pytest.mark.parametrize(
    "version, is_old",
    [
        ("3.12.3", True),
        ("3.12.4", False),
        ("3.12", True),
        ("3.9.10", True),
        ("4.0", False),
        ("3.16.0.dev2026102704", False),
    ],
)
def test_versions_are_compared_by_their_numbers(monkeypatch, version, is_old):
    """Not as text."""
    monkeypatch.setattr(keras, "__version__", version)
    monkeypatch.setitem(kaccum.versions.OLDEST_ON, BACKEND, {})
    with pytest.raises(ImportError) if is_old else contextlib.nullcontext():
        kaccum.versions.check()
