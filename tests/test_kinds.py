"""What kind of number a loss is: a mean, a sum, or neither."""

import inspect
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import layers, ops

from kaccum import GradientAccumulationCallback, accumulate
from kaccum.step import trial
from kaccum.step.kinds import MEAN, SUM, Numbers, kind_of
from kaccum.step.training_step import Options, TrainingStep
from tests.backends import (
    BACKEND,
    EXECUTIONS,
    compile_options,
    needs_strategies,
    only_on,
    own_step,
)
from tests.profiles import at_night
from tests.reference import strategy_of

RNG = np.random.default_rng(0)
# Two windows, and a short one.
EXAMPLES = 36
X = RNG.normal(size=(EXAMPLES, 6)).astype("float32")
Y = RNG.uniform(size=(EXAMPLES, 3)).astype("float32")
CLASSES = RNG.integers(0, 3, EXAMPLES).astype("int32")
# Sentences of one to seven words; 0 stands for none.
LENGTHS = RNG.integers(1, 8, EXAMPLES)
WORDS = RNG.integers(1, 5, (EXAMPLES, 7)).astype("int32")
WORDS *= np.arange(7) < LENGTHS[:, None]
UNEQUAL = {
    name: (RNG.uniform(size=EXAMPLES) > 0.5).astype("float32") for name in "ab"
}

WAYS = {
    "steps": (4, {"steps": 4, "execution": "graph"}),
    "cut": (16, {"micro_batch_size": 5}),
    "one example": (1, {"steps": 16}),
}
NOT_THE_LARGE_BATCH = "A loss must be a mean or a sum over examples for micro"


class Case(NamedTuple):
    """A model, and its loss.

    Args:
        build: Makes the model.
        compiled: More for `compile`.
        x: Inputs.
        y: Targets.
        fit: More for `fit`.
    """

    build: Any
    compiled: dict
    x: Any = X
    y: Any = Y
    fit: Any = {}


def dense(regularizer=None, kind=keras.Model):
    x = keras.Input((6,))
    h = layers.Dense(5, "tanh", kernel_regularizer=regularizer)(x)
    return kind(x, layers.Dense(3)(h))


def of_words(mask_zero=False):
    x = keras.Input((7,))
    h = layers.Embedding(5, 4, mask_zero=mask_zero)(x)
    words = layers.Dense(5, name="words")(h)
    classes = layers.GlobalAveragePooling1D()(h)
    classes = layers.Dense(3, name="classes")(classes)
    return keras.Model(x, {"words": words, "classes": classes})


def two_outputs():
    x = keras.Input((6,))
    h = layers.Dense(5, "tanh", kernel_regularizer="l2")(x)
    return keras.Model(x, {n: layers.Dense(3, name=n)(h) for n in "ab"})


class Adding(layers.Layer):
    """Adds a loss of what passes through."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def call(self, inputs):
        self.add_loss(self.loss(ops.square(inputs)))
        return inputs


def adding(*losses):
    def build():
        x = keras.Input((6,))
        y = layers.Dense(3, kernel_regularizer="l2")(x)
        for loss in losses:
            y = Adding(loss)(y)
        return keras.Model(x, y)

    return build


def of_each(squares):
    return ops.mean(squares, -1)


def the_sum(y, y_pred):
    return ops.sum(ops.square(ops.convert_to_tensor(y) - y_pred))


def the_mean(y, y_pred):
    return ops.mean(ops.square(y - y_pred))


class TheSum(keras.losses.Loss):
    def call(self, y, y_pred):
        return the_sum(y, y_pred)


class SumOfItsOwn(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return ops.sum(ops.square(y - y_pred)) + sum(self.losses)


class MeanOfItsOwn(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight) / 3.0


class MeanOfASum(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        total = super().compute_loss(x, y, y_pred, sample_weight)
        return total / ops.cast(ops.shape(y)[0], total.dtype)


def of_words_that_count(y, y_pred):
    """As tutorials of translation have it."""
    each = keras.losses.sparse_categorical_crossentropy(
        y, y_pred, from_logits=True
    )
    counts = ops.cast(ops.not_equal(y, 0), each.dtype)
    return ops.sum(each * counts) / ops.sum(counts)


def contrastive(y, y_pred):
    """The nearer the examples of a class, the better."""
    same = ops.cast(ops.equal(y[:, None], y[None, :]), y_pred.dtype)
    near = ops.log_softmax(ops.matmul(y_pred, ops.transpose(y_pred)), -1)
    return -ops.sum(same * near, -1) / ops.sum(same, -1)


def of_pairs(y, y_pred):
    """The same of others only: 0 / 0 where no two are of a class."""
    same = ops.cast(ops.equal(y[:, None], y[None, :]), y_pred.dtype)
    same = same * (1.0 - ops.eye(ops.shape(same)[0]))
    near = ops.log_softmax(ops.matmul(y_pred, ops.transpose(y_pred)), -1)
    return -ops.sum(same * near) / ops.sum(same)


def mse(reduction):
    return keras.losses.MeanSquaredError(reduction=reduction)


def crossentropy(reduction="sum_over_batch_size"):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction=reduction
    )


WORDS_AND_CLASSES = {"words": WORDS, "classes": CLASSES}
TWICE = {"a": Y, "b": Y}
EXACT = {
    "mean, one number": Case(dense, {"loss": the_mean}),
    "sum, one number": Case(lambda: dense("l2"), {"loss": the_sum}),
    "sum, one number, said": Case(dense, {"loss": TheSum(reduction="sum")}),
    "sum, one number, not said": Case(dense, {"loss": TheSum()}),
    "sum, compute_loss": Case(lambda: dense("l2", SumOfItsOwn), {}),
    "mean, compute_loss": Case(
        lambda: dense("l2", MeanOfItsOwn), {"loss": the_mean}
    ),
    "sum over 3, compute_loss": Case(
        lambda: dense("l2", MeanOfItsOwn), {"loss": mse("sum")}
    ),
    "mean of a sum, compute_loss": Case(
        lambda: dense(kind=MeanOfASum), {"loss": mse("sum")}
    ),
    "added, each": Case(adding(of_each), {}, y=None),
    "added, sum": Case(adding(ops.sum), {}, y=None),
    "added, mean": Case(adding(ops.mean), {}, y=None),
    "added, mean and sum": Case(adding(ops.mean, ops.sum), {}, y=None),
    "mean, added each": Case(adding(of_each), {"loss": "mse"}),
    "mean, added sum": Case(adding(ops.sum), {"loss": "mse"}),
    "mean, added mean": Case(adding(ops.mean), {"loss": "mse"}),
    "sum, added mean": Case(adding(ops.mean), {"loss": the_sum}),
    "mean and sum": Case(
        two_outputs,
        {
            "loss": {"a": mse("sum_over_batch_size"), "b": mse("sum")},
            "loss_weights": {"a": 0.7, "b": 0.05},
        },
        y=TWICE,
    ),
    "mean and sum, a list": Case(
        two_outputs,
        {"loss": [mse("sum"), "mae"], "loss_weights": [0.05, 1.0]},
        y=TWICE,
        fit={"sample_weight": UNEQUAL},
    ),
    "mean and sum, one number": Case(
        two_outputs,
        {"loss": [the_sum, the_mean], "loss_weights": [0.05, 1.0]},
        y=TWICE,
    ),
    "mask and sum": Case(
        lambda: of_words(mask_zero=True),
        {"loss": {"words": crossentropy(), "classes": crossentropy("sum")}},
        WORDS,
        WORDS_AND_CLASSES,
    ),
}
WARNED = {
    "contrastive": Case(dense, {"loss": contrastive}, y=CLASSES),
    "contrastive, of pairs": Case(
        dense, {"loss": of_pairs}, y=np.arange(EXAMPLES) % 6
    ),
    "Circle": Case(dense, {"loss": keras.losses.Circle()}, y=CLASSES),
    "Dice": Case(dense, {"loss": keras.losses.Dice()}),
    "Tversky": Case(dense, {"loss": keras.losses.Tversky()}),
    "words that count": Case(
        of_words,
        {"loss": {"words": of_words_that_count, "classes": crossentropy()}},
        WORDS,
        WORDS_AND_CLASSES,
    ),
    "added": Case(adding(lambda s: ops.sum(s) ** 2), {"loss": "mse"}),
    "compute_loss": Case(
        lambda: dense(kind=MeanOfItsOwn), {"loss": keras.losses.Dice()}
    ),
}


def turns(cases):
    """Each case in one way by day, one after the other, and in all at night."""
    pairs = []
    for i, name in enumerate(cases):
        ways = [*WAYS][i % 3 :] + [*WAYS][: i % 3]
        others = at_night([(name, way) for way in ways[1:]])
        pairs += [(name, ways[0]), *others]
    return pairs


# Keras loses terms of `add_loss` there, now and then, without us, too: it tells
# them by the `id` of arrays that are gone (eager on JAX, Keras 3.15).
QUICK = "graph" if BACKEND == "jax" else "eager"


def weights_and_loss(case, batch_size, execution=QUICK, **arguments):
    """How far a fit moves the weights, and the losses of its log."""
    keras.utils.set_random_seed(0)
    model = case.build()
    model.compile(
        keras.optimizers.SGD(0.003, momentum=0.9),
        **case.compiled,
        **compile_options(execution),
    )
    ours = [GradientAccumulationCallback(**arguments)] if arguments else []
    before = model.get_weights()
    log = model.fit(
        case.x,
        case.y,
        batch_size=batch_size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=ours,
        **case.fit,
    )
    moves = [a - b for a, b in zip(model.get_weights(), before)]
    return np.concatenate([np.ravel(m) for m in moves]), log.history["loss"]


def assert_close(ours, large):
    """How far the weights moved: the same, to rounding."""
    scale = np.abs(large).max()
    assert scale > 1e-4
    np.testing.assert_allclose(ours, large, rtol=0.0, atol=1e-4 * scale)


@pytest.mark.parametrize("name, way", turns(EXACT))
def test_sums_and_means_are_the_large_batch(name, way):
    """Laws 1, 2 and 8: also one beside the other, and measured ones."""
    size, arguments = WAYS[way]
    weights, losses = weights_and_loss(EXACT[name], 16)
    ours, ours_logged = weights_and_loss(EXACT[name], size, **arguments)
    assert_close(ours, weights)
    np.testing.assert_allclose(ours_logged, losses, rtol=2e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_sums_beside_means_are_the_large_batch_however_compiled(execution):
    """Law 2: a second gradient of the same forward pass."""
    case = EXACT["mean and sum"]
    weights, _ = weights_and_loss(case, 16)
    ours, _ = weights_and_loss(case, 4, execution, steps=4)
    assert_close(ours, weights)


@pytest.mark.parametrize("name, way", turns(WARNED))
def test_what_is_neither_is_told(name, way):
    """One warning for a model, with numbers."""
    size, arguments = WAYS[way]
    if size == 1 and name in ("Circle", "contrastive, of pairs"):
        pytest.skip("nothing to compare in two examples")
    with pytest.warns(UserWarning, match=NOT_THE_LARGE_BATCH) as told:
        weights_and_loss(WARNED[name], size, **arguments)
    # (Keras's own about 64 bits: `setup.cfg`.)
    texts = [str(w.message) for w in told if w.category is UserWarning]
    assert len([t for t in texts if "64 requested in" not in t]) == 1


def test_the_warning_names_the_loss_and_the_numbers():
    """And what to write."""
    with pytest.warns(
        UserWarning,
        match=r"Received: 'contrastive', which is [\d.]+ of some examples, and "
        r"[\d.]+ and [\d.]+ of their halves\. This run is not that of the "
        r"large batch\. With `whole_batch_loss=True` it is; or, if the loss "
        r"divides by something of its own, with `weight`, a function that "
        r"computes that\.$",
    ):
        weights_and_loss(WARNED["contrastive"], 4, steps=4)


@pytest.mark.parametrize("name", ["mean, one number", "mean and sum"])
def test_losses_are_measured_once(name, monkeypatch):
    """In the first fit of a model; a second one knows."""
    measured = []
    measure = trial.measure
    monkeypatch.setattr(
        "kaccum.step.trial.measure",
        lambda *args: measured.append(1) or measure(*args),
    )
    case = EXACT[name]
    model = case.build()
    model.compile("sgd", **case.compiled, **compile_options())
    for _ in range(2):
        model.fit(
            case.x,
            case.y,
            batch_size=4,
            verbose=0,
            callbacks=[GradientAccumulationCallback(4)],
        )
    assert measured == [1]


def test_measuring_moves_nothing():
    """Neither random numbers, nor averages, nor what a loss counts."""

    class Counting(keras.losses.Loss):
        def __init__(self):
            super().__init__()
            self.calls = keras.Variable(0.0, trainable=False, name="calls")

        def call(self, y, y_pred):
            self.calls.assign_add(1.0)
            return the_mean(y, y_pred)

    keras.utils.set_random_seed(0)
    loss = Counting()
    parts = [layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *parts])
    model.loss_of_its_own = loss
    model.compile("sgd", loss, **compile_options("eager"))

    def values():
        return [np.array(v) for v in [*model.variables, loss.calls]]

    before = values()
    assert kind_in_a_step(model, (X[:8], Y[:8])) == MEAN
    for old, new in zip(before, values()):
        np.testing.assert_array_equal(old, new)


ONE_HOT = np.eye(3, dtype="float32")[CLASSES]
PROBABILITIES = np.abs(Y) / np.abs(Y).sum(-1, keepdims=True)
DATA = {
    "CTC": (
        RNG.integers(1, 4, (EXAMPLES, 2)).astype("int32"),
        RNG.normal(size=(EXAMPLES, 6, 4)).astype("float32"),
    ),
    "Circle": (CLASSES, Y),
    "CategoricalGeneralizedCrossEntropy": (CLASSES, PROBABILITIES),
    # Of probabilities that add up to 1 they would be means.
    "Dice": (ONE_HOT, Y),
    "Tversky": (ONE_HOT, Y),
    "SparseCategoricalCrossentropy": (CLASSES, PROBABILITIES),
    # (From Keras 3.16 on.)
    "SparseCategoricalFocalCrossentropy": (CLASSES, PROBABILITIES),
}
IN_KERAS = [
    name
    for name, kind in inspect.getmembers(keras.losses, inspect.isclass)
    if issubclass(kind, keras.losses.Loss) and kind is not keras.losses.Loss
]


class Showing(layers.Layer):
    """Shows its input, scaled by a weight."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        return inputs * self.scale


@pytest.mark.parametrize("name", IN_KERAS)
def test_no_class_of_keras_raises_a_false_alarm(name):
    """All but three are means or sums, with weights and without."""
    y, y_pred = DATA.get(name, (ONE_HOT, PROBABILITIES))
    x = keras.Input(y_pred.shape[1:])
    model = keras.Model(x, Showing()(x))
    for reduction, kind, batch in (
        ("sum_over_batch_size", MEAN, (y_pred, y, UNEQUAL["a"] + 0.5)),
        ("mean_with_sample_weight", MEAN, (y_pred, y, UNEQUAL["a"])),
        ("sum", SUM, (y_pred, y)),
    ):
        loss = getattr(keras.losses, name)(reduction=reduction)
        model.compile("sgd", loss, **compile_options())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = kind_in_a_step(model, batch)
        alarms = [w for w in told if NOT_THE_LARGE_BATCH in str(w.message)]
        is_neither = name in ("Circle", "Dice", "Tversky")
        assert bool(alarms) == is_neither
        assert is_neither or found == kind


def kind_in_a_step(model, batch):
    """What a step takes the loss of a model for."""
    kinds = kinds_of(model, batch)
    return kinds.of(model._compile_loss._flat_losses[0].loss)


def kinds_of(model, batch):
    """What a step learns of the losses of a model."""
    model.make_train_function()
    step = TrainingStep(model, Options())
    runner = step.backend.runner(model, step)
    x, y, *weights = keras.tree.map_structure(ops.convert_to_tensor, batch)
    model._compile_loss.build(y, model.outputs[0])
    trial.measure(step, [(x, y, *weights)], runner.look)
    return step.kinds


@pytest.mark.parametrize("way", ["steps", *at_night(["cut", "one example"])])
def test_weight_says_what_a_loss_of_words_divides_by(way):
    """The masked loss of tutorials is then exact without another pass."""
    case = Case(
        lambda: keras.Sequential([*of_words().layers[:2], layers.Dense(5)]),
        {"loss": of_words_that_count},
        WORDS,
        WORDS,
    )

    def words_that_count(x, y, sample_weight):
        return ops.sum(ops.cast(ops.not_equal(y, 0), "float32"))

    weights, losses = weights_and_loss(case, 16)
    size, arguments = WAYS[way]
    ours, ours_logged = weights_and_loss(
        case, size, **arguments, weight=words_that_count
    )
    assert_close(ours, weights)
    np.testing.assert_allclose(ours_logged, losses, rtol=2e-5)


def test_weight_says_that_a_step_of_ones_own_takes_a_sum():
    """Also inside of `accumulate`."""

    class Summing(keras.Model):
        train_step = own_step(the_sum)

    def build():
        keras.utils.set_random_seed(0)
        model = dense(kind=Summing)
        model.compile(keras.optimizers.SGD(0.01), **compile_options())
        return model

    large, ours, looped = build(), build(), build()
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    large.fit(X[:32], Y[:32], batch_size=16, **options)
    ours.fit(
        X[:32],
        Y[:32],
        batch_size=4,
        callbacks=[GradientAccumulationCallback(4, weight="sum")],
        **options,
    )
    with accumulate(looped, 4, weight="sum"):
        for i in [*range(0, 32, 4), *range(0, 32, 4)]:
            looped.train_on_batch(X[i : i + 4], Y[i : i + 4])
    for model in (ours, looped):
        for a, b in zip(model.get_weights(), large.get_weights()):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_terms_without_data_count_where_no_example_does():
    """As in the large batch: a window of empty weights has its regularizer."""

    def of_none(y, y_pred):
        return ops.sum(0.0 * y_pred) + 0.0 * ops.sum(y)

    case = Case(lambda: dense("l2"), {"loss": of_none})
    weights, _ = weights_and_loss(case, 16)
    ours, _ = weights_and_loss(
        case, 4, steps=4, weight=lambda x, y, w: 0.0 * ops.sum(y)
    )
    assert_close(ours, weights)


def test_a_weight_that_is_no_number_is_refused():
    """It is the denominator of one loss."""
    with pytest.raises(
        ValueError,
        match="The function `weight` must return a number, or a scalar tensor. "
        r"Received: a tensor of shape \(4,\).",
    ):
        weights_and_loss(
            Case(dense, {"loss": "mse"}),
            4,
            steps=3,
            weight=lambda x, y, w: ops.ones(4),
        )


def test_a_loss_that_cannot_be_tried_is_told():
    """Of outputs that do not have the examples along their first axis."""

    class Mean(layers.Layer):
        def call(self, inputs):
            return ops.mean(inputs, 0, keepdims=True)

    x = keras.Input((6,))
    model = keras.Model(x, Mean()(layers.Dense(3)(x)))
    model.compile("sgd", the_mean, **compile_options("eager"))
    with pytest.warns(
        UserWarning,
        match="A loss that returns one number hides whether it is a mean or a "
        "sum, and is taken for a mean over examples where it cannot be tried "
        "on parts of a micro-batch. Received: 'the_mean', and this obstacle: "
        "ValueError: All arrays of a batch must have the same examples .* Pass "
        "`weight`.",
    ):
        model.fit(
            X,
            Y,
            batch_size=4,
            verbose=0,
            callbacks=[GradientAccumulationCallback(2)],
        )


@pytest.mark.parametrize(
    "values, weights, twice, kind",
    [
        ([2.0, 2.0, 1.0, 3.0], [4.0, 4.0, 2.0, 2.0], None, "mean"),
        ([2.0, 2.0, 1.0, 5.0], [4.0, 4.0, 3.0, 1.0], None, "mean"),
        ([4.0, 4.0, 1.0, 3.0], [4.0, 4.0, 2.0, 2.0], None, "sum"),
        ([4.5, 4.5, 1.5, 3.5], [4.0, 4.0, 2.0, 2.0], 8.5, "sum"),
        ([4.5, 4.5, 1.5, 3.5], [4.0, 4.0, 2.0, 2.0], 9.0, "neither"),
        ([4.0, 4.0, 1.0, 3.0], [None] * 4, None, "sum"),
        ([2.0, 2.0, 1.0, 3.0], [None] * 4, None, "neither"),
        ([2.1, 2.1, 1.0, 3.0], [4.0, 4.0, 2.0, 2.0], None, "neither"),
        ([2.0, 2.1, 1.0, 3.0], [4.0, 4.0, 2.0, 2.0], None, None),
        ([0.0] * 4, [4.0, 4.0, 2.0, 2.0], None, None),
        ([np.nan, 1.0, 1.0, 1.0], [4.0, 4.0, 2.0, 2.0], None, None),
        ([np.inf, np.inf, 1.0, 1.0], [4.0, 4.0, 2.0, 2.0], None, None),
        ([2.0, 2.0, np.nan, 3.0], [4.0, 4.0, 2.0, 2.0], None, "neither"),
        ([2.0, 2.0, np.nan, 3.0, 1.0, 3.0], [4.0] * 6, None, "mean"),
        ([2.0, 2.0, 1.5, 3.0, np.nan, 3.0], [4.0] * 6, None, "neither"),
    ],
)
def test_a_kind_is_told_by_the_parts(values, weights, twice, kind):
    """What averages is a mean, what adds up is a sum."""
    assert kind_of(Numbers(values, weights, twice)) == kind


def test_measuring_leaves_the_data_alone():
    """Keras changes weights in place where it computes a loss (PyTorch)."""
    x = keras.Input((3,))
    model = keras.Model(x, Showing()(x))
    model.compile("sgd", keras.losses.Circle(), **compile_options("eager"))
    batch = [Y[:8], CLASSES[:8], UNEQUAL["a"][:8] + 0.5]
    batch = [ops.convert_to_tensor(array.copy()) for array in batch]
    before = [ops.convert_to_numpy(array).copy() for array in batch]
    with pytest.warns(UserWarning, match=NOT_THE_LARGE_BATCH):
        kind_in_a_step(model, tuple(batch))
    for old, new in zip(before, batch):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


class Computing(keras.Model):
    """A step that takes the losses as they are compiled."""

    def train_step(self, *arguments):
        def loss(y, y_pred):
            return self.compute_loss(None, y, y_pred)

        return own_step(loss)(self, *arguments)


class ComputingMean(keras.Model):
    """A step that makes a mean of their sum."""

    def train_step(self, *arguments):
        def loss(y, y_pred):
            total = self.compute_loss(None, y, y_pred)
            return total / ops.cast(ops.shape(y_pred)[0], total.dtype)

        return own_step(loss)(self, *arguments)


def test_a_sum_in_a_step_of_ones_own_is_told():
    """What the step makes of it cannot be known: a mean, as before, or not."""
    case = Case(lambda: dense(kind=ComputingMean), {"loss": the_sum})
    with pytest.warns(UserWarning, match='pass `weight="sum"`, else') as told:
        ours, _ = weights_and_own(case, 4, steps=4)
    assert len([w for w in told if w.category is UserWarning]) == 1
    large, _ = weights_and_own(case, 16)
    assert_close(ours, large)
    summed = Case(lambda: dense(kind=Computing), {"loss": the_sum})
    large, _ = weights_and_own(summed, 16)
    ours, _ = weights_and_own(summed, 4, steps=4, weight="sum")
    assert_close(ours, large)


def weights_and_own(case, batch_size, **arguments):
    """One epoch of whole windows, of a step of its own."""
    keras.utils.set_random_seed(0)
    model = case.build()
    model.compile("sgd", **case.compiled, **compile_options(QUICK))
    ours = [GradientAccumulationCallback(**arguments)] if arguments else []
    before = model.get_weights()
    model.fit(
        case.x[:32],
        case.y[:32],
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=ours,
    )
    moves = [a - b for a, b in zip(model.get_weights(), before)]
    return np.concatenate([np.ravel(m) for m in moves]), None


@only_on("jax", "torch", reason="Keras adds up no losses of two dtypes (3.15)")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_raises_no_false_alarm(policy, recwarn):
    """Its rounding is coarser."""
    x = keras.Input((6,))
    with _policy(policy):
        y = layers.Dense(3)(x)
        for loss in (ops.mean, ops.sum):
            y = Adding(lambda s, loss=loss: 0.1 * loss(s))(y)
        model = keras.Model(x, y)
        model.compile("sgd", "mse", **compile_options(QUICK))
        step_kinds = kinds_of(model, (X[:8], Y[:8]))
    assert step_kinds.added == ["mean", "sum"]
    assert not [w for w in recwarn if NOT_THE_LARGE_BATCH in str(w.message)]


class _policy:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.name)

    def __exit__(self, *error):
        keras.config.set_dtype_policy(self.before)


@pytest.mark.parametrize("loss", [ops.mean, ops.sum])
def test_terms_that_cancel_raise_no_false_alarm(loss, recwarn):
    """The divergence of a variational encoder near its start."""

    def divergence(squares):
        small = 5e-3 * squares
        return loss(-0.5 * (1 + small - small**2 - ops.exp(small)))

    keras.utils.set_random_seed(0)
    model = adding(divergence)()
    model.compile("sgd", "mse", **compile_options(QUICK))
    assert kinds_of(model, (X[:8], Y[:8])).added == [loss.__name__]
    assert not [w for w in recwarn if NOT_THE_LARGE_BATCH in str(w.message)]


def test_a_sum_of_another_shape_is_a_sum():
    """Keras takes the mean of the one number that is there."""
    case = Case(dense, {"loss": lambda y, p: ops.reshape(the_sum(y, p), (1,))})
    weights, losses = weights_and_loss(case, 16)
    ours, ours_logged = weights_and_loss(case, 4, steps=4)
    assert_close(ours, weights)
    np.testing.assert_allclose(ours_logged, losses, rtol=2e-5)


def test_a_loss_that_is_zero_at_first_is_told_later():
    """A sum that begins to count after the first window."""

    def late(y, y_pred):
        counts = ops.cast(ops.max(y) > 2.0, "float32")
        return counts * ops.sum(ops.square(y - y_pred))

    y = Y.copy()
    y[16:] += 3.0
    case = Case(dense, {"loss": late}, y=y)
    with pytest.warns(UserWarning, match=NOT_THE_LARGE_BATCH):
        weights_and_loss(case, 4, steps=4)


def test_terms_that_are_added_in_training_only_are_told():
    """Which are means, and which sums, is known by their order."""

    class InTraining(Adding):
        def call(self, inputs, training=None):
            if training:
                self.add_loss(ops.sum(ops.square(inputs)))
            return inputs

    def build():
        x = keras.Input((6,))
        return keras.Model(x, InTraining(None)(layers.Dense(3)(x)))

    with pytest.warns(UserWarning, match="Received: 1 and 0. Pass `weight`"):
        weights_and_loss(Case(build, {"loss": "mse"}), 4, steps=4)


@only_on("torch", reason="no modules and random numbers of PyTorch")
def test_measuring_moves_nothing_of_pytorch():
    """Statistics of modules, and the random numbers of the process."""
    import torch

    class Plain(keras.Model):
        """Its `call` is not told whether it trains."""

        def __init__(self):
            super().__init__()
            module = torch.nn.BatchNorm1d(6)
            self.wrapped = layers.TorchModuleWrapper(module)
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(self.wrapped(inputs))

    class Drawing(keras.losses.Loss):
        def call(self, y, y_pred):
            return the_mean(y, y_pred) + 0.0 * torch.rand(())

    def drawn(*callbacks):
        keras.utils.set_random_seed(0)
        model = Plain()
        model(X[:2])
        model.compile("sgd", Drawing())
        before = int(model.wrapped.module.num_batches_tracked)
        model.fit(X, Y, 4, verbose=0, shuffle=False, callbacks=[*callbacks])
        tracked = int(model.wrapped.module.num_batches_tracked) - before
        return tracked, torch.rand(3)

    plain, ours = drawn(), drawn(GradientAccumulationCallback(3))
    assert ours[0] == plain[0] == 9
    assert torch.equal(ours[1], plain[1])


def test_weight_need_not_be_hashable():
    """A function of a user's own may be an object."""

    class Weight:
        __hash__ = None

        def __call__(self, x, y, sample_weight):
            return float(len(y))

    weights_and_loss(Case(dense, {"loss": "mse"}), 4, steps=4, weight=Weight())


@needs_strategies
@pytest.mark.parametrize("name", ["sum, one number", "mean, added sum"])
def test_replicas_have_the_kinds_of_one_device(name):
    """Of the first replica's part of a micro-batch."""
    weights, losses = weights_and_loss(EXACT[name], 12)
    with strategy_of(2).scope():
        ours, ours_logged = weights_and_loss(EXACT[name], 4, "graph", steps=3)
    assert_close(ours, weights)
    np.testing.assert_allclose(ours_logged, losses, rtol=2e-5)
