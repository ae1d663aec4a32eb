"""Tests of the tests: wrong implementations must not pass."""

import dataclasses
import functools

import pytest
from keras import ops

from kaccum.fit.session import Session
from kaccum.fit.window import Window
from kaccum.step import trial, weights
from kaccum.step.recording import Recording
from kaccum.step.training_step import TrainingStep
from kaccum.sums.gradients import GradientSums
from tests import reference
from tests.backends import EXECUTIONS
from tests.profiles import at_night
from tests.reference import assert_same, check, fit_large, fit_micro

# What is wrong is wrong in every step, also where nothing is compiled.
Problem = functools.partial(reference.Problem, execution=EXECUTIONS[-1])


@pytest.fixture(autouse=True)
def new_models():
    """None that was compiled with or without what is wrong here."""
    reference.MODELS.forget()
    yield
    reference.MODELS.forget()


def divides_by_steps(monkeypatch):
    """Every micro-batch counts the same, and the window is always full."""
    monkeypatch.setattr(
        weights,
        "weight_of",
        lambda *_, **__: 1.0 / Problem().steps,
    )
    real = GradientSums._window_gradients

    def window_gradients(self, weight, count, sums):
        return real(self, ops.ones_like(weight), count, sums)

    monkeypatch.setattr(GradientSums, "_window_gradients", window_gradients)


def weighs_all_the_same(monkeypatch):
    """A mean of means."""
    monkeypatch.setattr(weights, "weight_of", lambda *_, **__: 1.0)


def drops_the_short_window(monkeypatch):
    """The end of every epoch is lost."""

    def close_window(self):
        self._window.reset()
        self._step.empty()

    monkeypatch.setattr(Session, "close_window", close_window)


def leaks_the_short_window(monkeypatch):
    """A window spans two epochs."""
    monkeypatch.setattr(Session, "close_window", lambda self: None)


def applies_twice(monkeypatch):
    """Two updates a window."""
    real = GradientSums.close

    def close(self, parts):
        real(self, parts)
        real(self, parts)

    monkeypatch.setattr(GradientSums, "close", close)


def leaves_the_sums_uncleared(monkeypatch):
    """A window's gradient goes into the next one's."""
    monkeypatch.setattr(GradientSums, "empty", lambda self, **options: None)
    monkeypatch.setattr(TrainingStep, "_releases", False)


def updates_every_micro_batch(monkeypatch):
    """No accumulation at all."""
    monkeypatch.setattr(Window, "closes", lambda self, count: [True] * count)
    monkeypatch.setattr(Window, "advance", lambda self, *counts: None)
    monkeypatch.setattr(Window, "is_open", False)


def hears_no_loss(monkeypatch, measures=False):
    """Weighs masked micro-batches by their examples."""
    hidden = weights.Reduction("hidden")
    if not measures:
        monkeypatch.setattr(trial, "measure", lambda *_: True)
    monkeypatch.setattr(weights, "reduction_of", lambda *_, **__: hidden)


WRONG = [
    divides_by_steps,
    weighs_all_the_same,
    drops_the_short_window,
    leaks_the_short_window,
    applies_twice,
    leaves_the_sums_uncleared,
    updates_every_micro_batch,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.__name__)
@pytest.mark.parametrize("optimizer", ["SGD", *at_night(["Adam"])])
def test_a_wrong_implementation_is_caught(wrong, optimizer, monkeypatch):
    """The check that all laws rest on can fail."""
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        check(Problem(optimizer=optimizer, epochs=3))


@pytest.mark.parametrize(
    "kind", ["mask", "mean_with_sample_weight", "sum", "sum_of_tokens"]
)
def test_a_wrong_weight_is_caught(kind, monkeypatch):
    """Law 2 is what these problems test."""
    hears_no_loss(monkeypatch)
    with pytest.raises(AssertionError):
        check(Problem(kind=kind, optimizer="SGD"))


@pytest.mark.parametrize("kind", ["mask", "mean_with_sample_weight"])
def test_a_wrong_weight_is_measured(kind, monkeypatch):
    """What is heard is compared with what the losses are."""
    hears_no_loss(monkeypatch, measures=True)
    with pytest.raises(UserWarning, match="A loss must be a mean or a sum"):
        check(Problem(kind=kind, optimizer="SGD"))


def test_regularizers_that_count_every_micro_batch_are_caught(monkeypatch):
    """Law 2: under a sum, a term without data counts once a window."""
    monkeypatch.setattr(Recording, "_regularizers", [])
    with pytest.raises(AssertionError):
        check(Problem(kind="sum", regularizer="l2", optimizer="SGD"))


def test_the_oracle_tells_problems_apart():
    """Other data, other weights: nothing is compared with itself."""
    problem = Problem()
    other = dataclasses.replace(problem, examples=21)
    with pytest.raises(AssertionError):
        assert_same(problem, fit_micro(other), fit_large(problem))
