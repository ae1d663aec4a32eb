"""How much is tested: every law in minutes, or at night all the breadth.

    python -m pytest                                 # every law
    python -m pytest --hypothesis-profile nightly    # everything

A profile is one of Hypothesis's, by its own option. `nightly` draws ten times
as many runs, and adds the tests that are marked `nightly`.
"""

import hypothesis
import pytest

#: Marks a test, or a case of one, that only the nightly profile runs.
nightly = pytest.mark.nightly


def register():
    """Tells Hypothesis of the profiles, before its own option is read."""
    # The same runs each time, so that what failed fails again.
    hypothesis.settings.register_profile(
        "fast", deadline=None, derandomize=True
    )
    hypothesis.settings.register_profile("dev", deadline=None)
    hypothesis.settings.register_profile("nightly", deadline=None)
    hypothesis.settings.load_profile("fast")


def name():
    """Of the profile that is loaded."""
    return hypothesis.settings.get_current_profile_name()


def is_nightly():
    """Whether everything is tested."""
    return name() == "nightly"


def drawn(count, **options):
    """How many runs a test draws: at night ten times as many."""
    count *= 10 if is_nightly() else 1
    return hypothesis.settings(max_examples=count, **options)


def at_night(cases):
    """Cases that only the nightly profile runs: values, or tuples of them."""
    return [
        pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=nightly)
        for c in cases
    ]
