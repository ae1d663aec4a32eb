"""The tests pass on the oldest, the newest and the nightly versions."""

import pytest

from tests import versions
from tests.backends import only_on
from tests.profiles import nightly


@nightly
@only_on("tensorflow", reason="each case installs and tests it")
@pytest.mark.parametrize("name", versions.CASES)
def test_the_tests_pass_on_other_versions(name):
    """Each in a fresh environment, with the default profile."""
    row, have_passed = versions.run(name)
    assert have_passed, row


@pytest.mark.parametrize("name", versions.CASES)
def test_a_case_says_what_to_install(name):
    """A Python and what its pip is told, first to install the tests."""
    python, first, *_ = versions.CASES[name]
    assert python and first[0] == "install" and ".[test]" in first
