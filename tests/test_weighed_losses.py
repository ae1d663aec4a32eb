"""Where a loss is multiplied by its weight, and who adds the gradients.

That both ways train as the large batch is in test_same_fit.py.
"""

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback
from kaccum.fit.session import Session
from tests.backends import BACKEND, only_on
from tests.reference import Problem, build_model, check, fit_micro

HALF = "bfloat16"
DOUBLE = "float32" if BACKEND == "jax" else "float64"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(18, 4)).astype("float32")
Y = RNG.normal(size=(18, 3)).astype("float32")


class Own(keras.Model):
    """Has a step of its own."""

    def train_step(self, *arguments):
        return super().train_step(*arguments)


class OwnLoss(keras.Model):
    """Has a loss of its own."""

    def compute_loss(self, *arguments, **options):
        return super().compute_loss(*arguments, **options)


def small(kind=keras.Sequential, policy="float32", optimizer="sgd", loss="mse"):
    """A compiled model of `X`."""
    dense = keras.layers.Dense(3, dtype=policy)
    if kind is keras.Sequential:
        model = keras.Sequential([keras.Input((4,)), dense])
    else:
        inputs = keras.Input((4,))
        model = kind(inputs, dense(inputs))
    model.compile(optimizer, loss)
    return model


def quantized():
    """One that computes in float8."""
    model = small()
    model.layers[0].quantize("float8")
    model.compile("sgd", "mse")
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
        # JAX has none of 64 bits.
        (lambda: small(policy=DOUBLE), True),
        (lambda: small(policy="mixed_bfloat16"), False),
        (lambda: small(policy="bfloat16"), False),
        (lambda: small(policy="mixed_float16"), False),
        (lambda: small(optimizer=scaling()), False),
        # What a user's step does with its loss is not known.
        (lambda: small(Own), False),
        (lambda: small(OwnLoss), False),
        # Its "gradients" are scales of gradients, which it would scale.
        (quantized, False),
        (lambda: small(loss=keras.losses.MeanSquaredError(dtype=HALF)), False),
    ],
    ids=[
        "32",
        "64",
        "mixed b16",
        "b16",
        "mixed 16",
        "scales",
        "own step",
        "own loss",
        "float8",
        "half loss",
    ],
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


def trained(optimizer, layers, callbacks=None):
    """The weights after a fit, as a large batch or with `callbacks`."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), *(make() for make in layers)])
    model.compile(optimizer(0.1), "mse")
    if optimizer is Penalising:
        # It needs to know the weights.
        model.optimizer.build(model.trainable_variables)
    # A window's own first micro-batch is what the others are compared with.
    for size, count, scale in ((1, 2, 0.0), (4, 14, 1.0)):
        batch_size = size if callbacks else 2 * size
        x, y = scale * X[:count], scale * Y[:count]
        model.fit(x, y, batch_size, 2, 0, callbacks, shuffle=False)
    return model.get_weights()


def assert_is_the_large_batch(optimizer, *layers):
    """In windows of two, the last micro-batch of which is smaller."""
    large = trained(optimizer, layers)
    micro = trained(optimizer, layers, [GradientAccumulationCallback(2)])
    for one, other in zip(micro, large, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Penalising(keras.optimizers.SGD):
    """Adds to the loss."""

    def scale_loss(self, loss):
        penalty = sum(keras.ops.sum(v**2) for v in self._trainable_variables)
        return super().scale_loss(loss) + 0.1 * penalty


@only_on("tensorflow", "torch", reason="on JAX it sees no weights")
def test_an_optimizer_may_add_to_the_loss():
    """Its own terms count once a window, too."""

    assert_is_the_large_batch(Penalising, lambda: keras.layers.Dense(3))


@keras.ops.custom_gradient
def limited(x):
    """The same, with another gradient."""

    def gradient(*arguments, upstream=None):
        upstream = arguments[0] if upstream is None else upstream
        return keras.ops.clip(upstream, -1.0, 1.0)

    return x, gradient


class Clipped(keras.layers.Layer):
    """Limits gradients that means of losses never have."""

    def call(self, inputs):
        return limited(inputs)


def test_equal_micro_batches_are_not_scaled():
    """A layer that limits gradients sees those of the plain fit."""
    assert_is_the_large_batch(
        keras.optimizers.SGD,
        lambda: keras.layers.Dense(3),
        Clipped,
        lambda: keras.layers.Dense(3),
    )


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


def lent_to(model, monkeypatch, gradients_of):
    """What `backward` is to add to, micro-batch by micro-batch."""
    lent = []
    real = keras.optimizers.SGD.scale_loss

    def scale_loss(self, loss):
        # It is called after the sums were lent.
        lent.append(gradients_of(model))
        return real(self, loss)

    monkeypatch.setattr(keras.optimizers.SGD, "scale_loss", scale_loss)
    return lent


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
    seen.clear()
    lent = lent_to(model, monkeypatch, gradients_of)
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


@only_on("torch", reason="gradients are attributes of its tensors")
def test_an_error_leaves_no_sums(gradients_of):
    """One in the middle of a `backward` that adds to them."""
    model = small()
    fit(model)

    def fail(model):
        kernel, _ = model.trainable_variables
        kernel.value.register_hook(lambda gradient: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        fit(model, Meddling(fail))
    assert gradients_of(model) == [None, None]


@only_on("torch", reason="it adds in place")
@pytest.mark.parametrize("option", ["skip_nonfinite", "log_gradients"])
def test_gradients_that_are_looked_at_are_not_lent(
    option, gradients_of, monkeypatch
):
    """One that may be left out, or is measured, is a tensor of its own."""
    model = small()
    lent = lent_to(model, monkeypatch, gradients_of)
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


@only_on("torch", reason="two variables of Keras can be one of its tensors")
def test_a_weight_of_two_layers_is_added_once():
    """A module of PyTorch that two layers wrap."""
    import torch

    shared = []

    def first():
        shared[:] = [torch.nn.Linear(4, 4)]
        return keras.layers.TorchModuleWrapper(shared[0])

    def second():
        return keras.layers.TorchModuleWrapper(shared[0])

    assert_is_the_large_batch(
        keras.optimizers.SGD, first, second, lambda: keras.layers.Dense(3)
    )
