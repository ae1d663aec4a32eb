"""Where a loss is multiplied by its weight, and who adds the gradients.

That both ways train as the large batch is in test_same_fit.py.
"""

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback
from kaccum.fit.session import Session
from tests.backends import only_on
from tests.reference import Problem, build_model, check, fit_micro

RNG = np.random.default_rng(0)
X = RNG.normal(size=(18, 4)).astype("float32")
Y = RNG.normal(size=(18, 3)).astype("float32")


class Own(keras.Model):
    """Has a step of its own."""

    def train_step(self, *arguments):
        return super().train_step(*arguments)


def small(kind=keras.Sequential, policy="float32", optimizer="sgd"):
    """A compiled model of `X`."""
    dense = keras.layers.Dense(3, dtype=policy)
    if kind is keras.Sequential:
        model = keras.Sequential([keras.Input((4,)), dense])
    else:
        inputs = keras.Input((4,))
        model = kind(inputs, dense(inputs))
    model.compile(optimizer, "mse")
    return model


def scaling():
    """An optimizer that scales losses."""
    inner = keras.optimizers.SGD()
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)


def fit(model, *more, **options):
    """Trains in windows of two."""
    callback = GradientAccumulationCallback(2, **options)
    model.fit(X, Y, 3, verbose=0, shuffle=False, callbacks=[callback, *more])


@pytest.mark.parametrize(
    "model, expected",
    [
        (small, True),
        (lambda: small(policy="float64"), True),
        (lambda: small(policy="mixed_bfloat16"), False),
        (lambda: small(policy="bfloat16"), False),
        (lambda: small(policy="mixed_float16"), False),
        (lambda: small(optimizer=scaling()), False),
        # What a user's step does with its loss is not known.
        (lambda: small(Own), False),
    ],
    ids=["32", "64", "mixed b16", "b16", "mixed 16", "scales", "own step"],
)
def test_losses_are_weighed_where_that_cannot_round(model, expected):
    """Nor overflow."""
    model = model()
    fit(model)
    assert Session.of(model)._step.weighs_losses == expected


@pytest.mark.parametrize("kind", ["mean", "mask", "sample_weight", "sum"])
@pytest.mark.parametrize("is_weighed", [True, False])
def test_both_ways_are_the_large_batch(kind, is_weighed, monkeypatch):
    """Of a loss that is weighed, and of gradients that are."""
    from kaccum.step.training_step import TrainingStep

    problem = Problem(kind=kind, regularizer="l2", built=False)
    if not is_weighed:
        # (A cached property: of the class, it is found first.)
        monkeypatch.setattr(TrainingStep, "weighs_losses", False)
    check(problem)


# PyTorch: `backward` adds.


class Meddling(keras.callbacks.Callback):
    """Takes gradients of the weights between micro-batches."""

    def __init__(self, meddle):
        super().__init__()
        self.meddle = meddle

    def on_train_batch_end(self, batch, logs=None):
        self.meddle(self.model)


@pytest.fixture
def gradients_of():
    """What a model's weights have in `.grad`."""

    def found(model):
        return [v.value.grad for v in model.trainable_variables]

    return found


@only_on("torch", reason="it adds in place")
def test_the_sums_are_what_backward_adds_to(gradients_of, monkeypatch):
    """There is no copy of them, and no gradient beside them."""
    model = small()
    # Finds out which sums there are.
    fit(model)
    seen = []

    def look(model):
        (sums,) = Session.installed_on(model)._step.sums.gradients
        seen.append([total.value for total in sums._totals])
        assert gradients_of(model) == [None, None]

    fit(model, Meddling(look))
    # Six micro-batches: an update leaves nothing.
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert second == [None, None]
        assert all(total is not None for total in first)
    lent = []
    real = keras.optimizers.SGD.scale_loss

    def scale_loss(self, loss):
        lent.append(gradients_of(model))
        return real(self, loss)

    # It is called after the sums were lent.
    monkeypatch.setattr(keras.optimizers.SGD, "scale_loss", scale_loss)
    seen.clear()
    fit(model, Meddling(look))
    for given, held in zip(lent[1::2], seen[::2], strict=True):
        assert all(g is h for g, h in zip(given, held, strict=True))


@only_on("torch", reason="gradients are attributes of its tensors")
def test_gradients_of_a_callback_are_not_of_the_window(gradients_of):
    """What else adds to `.grad`, or clears it."""
    models = [small() for _ in range(3)]
    for model in models:
        model.set_weights(models[0].get_weights())

    def backward(model):
        keras.ops.sum(model(X)).backward()

    def clear(model):
        model.zero_grad()

    for model, meddle in zip(models, (id, backward, clear), strict=True):
        fit(model, Meddling(meddle))
    for one, *others in zip(*(m.get_weights() for m in models), strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


@only_on("torch", reason="it adds in place")
@pytest.mark.parametrize("option", ["skip_nonfinite", "log_gradients"])
def test_gradients_that_are_looked_at_are_not_lent(
    option, gradients_of, monkeypatch
):
    """One that may be left out, or is measured, is a tensor of its own."""
    model = small()
    lent = []
    real = keras.optimizers.SGD.scale_loss

    def scale_loss(self, loss):
        lent.append(gradients_of(model))
        return real(self, loss)

    monkeypatch.setattr(keras.optimizers.SGD, "scale_loss", scale_loss)
    fit(model, **{option: True})
    assert len(lent) == 6
    assert all(each == [None, None] for each in lent)


def test_a_window_of_problems_that_differ_in_weight():
    """The last micro-batch is smaller: its weight counts."""
    problem = Problem(examples=7, micro_batch=4, steps=2, built=False)
    model = build_model(problem)
    fit_micro(problem, model)
    assert Session.of(model)._step.weighs_losses
    check(problem)
