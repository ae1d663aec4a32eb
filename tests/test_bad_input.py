"""One clear error for each bad call, and nothing lost."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import ops

from kaccum import GradientAccumulationCallback, GradientAccumulator, accumulate
from tests.backends import BACKEND, needs_graphs, of_unknown_length, tf
from tests.reference import set_values, values_of

X, Y = np.ones((10, 2), "float32"), np.ones((10, 1), "float32")
STEPS = (
    "`steps` must be an integer >= 1, a dict of them by first epoch, or a "
    "function of the epoch. Received: steps="
)
KEYS = "The keys of `steps` must be epochs, integers >= 0. Received: "
VALUES = "The values of `steps` must be integers >= 1. Received: "
START = "A dict of `steps` must start at epoch 0. Received: steps="
RETURNED = "The function `steps` must return an integer >= 1. Received: "
ONE_OF = (
    "Exactly one of `steps` and `micro_batch_size` must be given. Received: "
    "steps="
)
SIZE = (
    "`micro_batch_size` must be an integer >= 1 or 'auto'. Received: "
    "micro_batch_size="
)
LEAVES = (
    "All arrays of a batch must have the same examples along their first axis "
    "to be cut into micro-batches. Received: a batch of shapes "
)
# PyTorch makes a list of a batch.
SHAPES = "[{}]." if BACKEND == "torch" else "({})."
ONE_CALLBACK = (
    "Only one callback of a `fit` must accumulate gradients. Received: 2 of "
    "`GradientAccumulationCallback`. Keep one."
)
NESTED = (
    "`accumulate` must be given a model that does not accumulate yet. "
    "Received: one inside of another `accumulate`, or of a `fit` with a "
    "`GradientAccumulationCallback`."
)
FIT_INSIDE = (
    "`fit` must not be called on a model inside its `accumulate`. Received: a "
    "`fit`. Pass it a `GradientAccumulationCallback` instead, outside of the "
    "`with` block."
)


def compiled(optimizer=None):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def fit(model, *callbacks):
    model.fit(X, Y, 2, verbose=0, shuffle=False, callbacks=list(callbacks))


@functools.cache
def plain_name():
    """What Keras calls its train function."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.make_train_function()
    return model.train_function.__name__


def refused_at_once(model, *callbacks):
    """A fit that must end before the model is taken over."""
    try:
        fit(model, *callbacks)
    finally:
        assert "make_train_function" not in vars(model)
        assert "get_metrics_result" not in vars(model)
        assert model.train_function.__name__ == plain_name()


def of(*steps, **options):
    """A call that makes callbacks and fits with them."""

    def call(model):
        made = [GradientAccumulationCallback(s, **options) for s in steps]
        refused_at_once(model, *made)

    return call


def of_function(value):
    """A call that fits with a function of the epoch."""
    return lambda model: fit(
        model, GradientAccumulationCallback(lambda epoch: value)
    )


def of_size(size, **arguments):
    """A call that fits with batches to be cut."""
    return of(None, micro_batch_size=size, **arguments)


def of_arrays(*arrays):
    """A call that is to cut a batch of these."""

    def call(model):
        batches = of_unknown_length(lambda: iter([arrays]))
        callback = GradientAccumulationCallback(micro_batch_size=2)
        model.fit(batches, verbose=0, callbacks=[callback])

    return call


def block(steps, inside=lambda model: None):
    """A call that enters an `accumulate`."""

    def call(model):
        with accumulate(model, steps):
            inside(model)

    return call


def block_in_fit(model):
    enter = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: block(2)(model)
    )
    fit(model, GradientAccumulationCallback(9), enter)


def hooks_by_hand(model):
    """A loop that calls them, as the one of Keras does."""
    callbacks = [GradientAccumulationCallback(2)]
    hooks = keras.callbacks.CallbackList(callbacks, model=model)
    hooks.on_train_begin()


WEIGHT = (
    '`weight` must be "sum", or a function of `(x, y, sample_weight)` that '
    "returns what the loss of a micro-batch divides by. Received: "
)
BAD_CALLS = {
    "steps=0": (of(0), ValueError, STEPS + "0 (int)."),
    "steps=-1": (of(-1), ValueError, STEPS + "-1 (int)."),
    "steps=int64(0)": (
        of(np.int64(0)),
        ValueError,
        STEPS + f"{np.int64(0)!r} (int64).",
    ),
    "steps=2.5": (of(2.5), TypeError, STEPS + "2.5 (float)."),
    "steps=4.0": (
        of(4.0),
        TypeError,
        STEPS + "4.0 (float). A division that is to give an integer is written "
        "`//`.",
    ),
    "steps=True": (of(True), TypeError, STEPS + "True (bool)."),
    "steps='4'": (of("4"), TypeError, STEPS + "'4' (str)."),
    "neither": (of(None), ValueError, ONE_OF + "None, micro_batch_size=None."),
    "both": (
        of(2, micro_batch_size=8),
        ValueError,
        ONE_OF + "2, micro_batch_size=8.",
    ),
    "micro_batch_size=0": (of_size(0), ValueError, SIZE + "0 (int)."),
    "micro_batch_size=-1": (of_size(-1), ValueError, SIZE + "-1 (int)."),
    "micro_batch_size=2.5": (of_size(2.5), TypeError, SIZE + "2.5 (float)."),
    "micro_batch_size=True": (of_size(True), TypeError, SIZE + "True (bool)."),
    "micro_batch_size=[8]": (of_size([8]), TypeError, SIZE + "[8] (list)."),
    "micro_batch_size='Auto'": (
        of_size("Auto"),
        ValueError,
        SIZE + "'Auto' (str).",
    ),
    "micro_batch_size='big'": (
        of_size("big"),
        ValueError,
        SIZE + "'big' (str).",
    ),
    "leaves-of-other-lengths": (
        of_arrays(X[:4], Y[:3]),
        ValueError,
        LEAVES + SHAPES.format("(4, 2), (3, 1)"),
    ),
    "leaf-without-examples": (
        of_arrays(X[:4], Y[:4], np.float32(1.0)),
        ValueError,
        LEAVES
        + SHAPES.format("(4, 2), (4, 1), ()")
        + " Of a data set that is not batched pass `.batch(size)`.",
    ),
    "steps=[4]": (of([4]), TypeError, STEPS + "[4] (list)."),
    "steps={}": (of({}), ValueError, START + "{} (dict)."),
    "steps={1: 4}": (of({1: 4}), ValueError, START + "{1: 4} (dict)."),
    "steps={0: 0}": (of({0: 0}), ValueError, VALUES + "0 (int) for epoch 0."),
    "steps={0: 2.5}": (
        of({0: 2.5}),
        TypeError,
        VALUES + "2.5 (float) for epoch 0.",
    ),
    "steps={0: True}": (
        of({0: True}),
        TypeError,
        VALUES + "True (bool) for epoch 0.",
    ),
    "steps={'0': 4}": (
        of({"0": 4}),
        TypeError,
        KEYS + "'0' (str) in steps={'0': 4}.",
    ),
    "steps={-1: 4}": (
        of({-1: 4}),
        ValueError,
        KEYS + "-1 (int) in steps={-1: 4}.",
    ),
    "steps-returns-0": (
        of_function(0),
        ValueError,
        RETURNED + "0 (int) for epoch 0.",
    ),
    "steps-returns-2.5": (
        of_function(2.5),
        TypeError,
        RETURNED + "2.5 (float) for epoch 0.",
    ),
    "steps-returns-None": (
        of_function(None),
        TypeError,
        RETURNED + "None (NoneType) for epoch 0.",
    ),
    "on_update=3": (
        of(2, on_update=3),
        TypeError,
        "`on_update` must be a function of the number of updates. Received: "
        "on_update=3 (int).",
    ),
    "skip_nonfinite=1": (
        of(2, skip_nonfinite=1),
        TypeError,
        "`skip_nonfinite` must be True or False. Received: skip_nonfinite=1 "
        "(int).",
    ),
    "log_gradients=1": (
        of(2, log_gradients=1),
        TypeError,
        "`log_gradients` must be True or False. Received: log_gradients=1 "
        "(int).",
    ),
    "by='updates'": (
        of({0: 2}, by="updates"),
        ValueError,
        '`by` must be "epoch" or "update". Received: by=\'updates\' (str).',
    ),
    "by=None": (
        of({0: 2}, by=None),
        TypeError,
        '`by` must be "epoch" or "update". Received: by=None (NoneType).',
    ),
    "by='update', steps=4": (
        of(4, by="update"),
        ValueError,
        '`by="update"` must be given with a dict, or a function, of the number '
        "of updates. Received: steps=4, which is the same for all. Leave `by` "
        "out.",
    ),
    "by='update', micro_batch_size": (
        of_size(8, by="update"),
        ValueError,
        '`by="update"` must be given with `steps`. Received: none. With '
        "`micro_batch_size` each batch is a window: have the data change its "
        "size.",
    ),
    "by='update', steps={1: 4}": (
        of({1: 4}, by="update"),
        ValueError,
        "A dict of `steps` must start at update 0. Received: steps={1: 4} "
        "(dict).",
    ),
    "by='update', steps={0: 0}": (
        of({0: 0}, by="update"),
        ValueError,
        VALUES + "0 (int) for update 0.",
    ),
    "steps='auto'": (
        of("auto"),
        TypeError,
        STEPS + "'auto' (str). Write `micro_batch_size=\"auto\"`.",
    ),
    "steps-takes-nothing": (
        of(lambda: 2),
        TypeError,
        "The function `steps` must take 1 argument. Received: one that takes "
        "().",
    ),
    "on_update-takes-two": (
        of(2, on_update=lambda updates, logs: None),
        TypeError,
        "The function `on_update` must take 1 argument. Received: one that "
        "takes (updates, logs).",
    ),
    "weight=3": (of(2, weight=3), TypeError, WEIGHT + "weight=3 (int)."),
    "weight='mean'": (
        of(2, weight="mean"),
        ValueError,
        WEIGHT + "weight='mean' (str).",
    ),
    "weight-takes-two": (
        of(2, weight=lambda x, y: 1.0),
        TypeError,
        "The function `weight` must take 3 arguments. Received: one that takes "
        "(x, y).",
    ),
    "hooks-by-hand": (
        hooks_by_hand,
        RuntimeError,
        "The hooks of a callback must be called by the `fit` of its model for "
        "gradients to be accumulated. Received: `on_train_begin` outside of "
        "it. In a training loop of your own write `with "
        "kaccum.accumulate(model, steps):` around it.",
    ),
    "accumulate-swapped": (
        lambda model: accumulate(2, model),
        TypeError,
        "`accumulate` must be called with a model and then `steps`. Received: "
        "them the other way round. Write `accumulate(model, steps)`.",
    ),
    "two-callbacks": (of(2, 3), RuntimeError, ONE_CALLBACK),
    "two-callbacks-one-of-1": (of(1, 3), RuntimeError, ONE_CALLBACK),
    "accumulate-0": (
        block(0),
        ValueError,
        "`steps` must be an integer >= 1. Received: steps=0 (int).",
    ),
    "accumulate-dict": (
        block({0: 4}),
        TypeError,
        "`steps` must be an integer >= 1. Received: steps={0: 4} (dict).",
    ),
    "accumulate-twice": (block(2, block(2)), RuntimeError, NESTED),
    "accumulate-in-fit": (block_in_fit, RuntimeError, NESTED),
    "fit-in-accumulate": (block(2, fit), RuntimeError, FIT_INSIDE),
    "callback-in-accumulate": (
        block(2, lambda model: fit(model, GradientAccumulationCallback(2))),
        RuntimeError,
        FIT_INSIDE,
    ),
}


@pytest.fixture(scope="module")
def model():
    """A model to call badly, its first state, and that after a good fit."""
    keras.utils.set_random_seed(0)
    model, twin = compiled(), compiled()
    twin.set_weights(model.get_weights())
    for each in (model, twin):
        each.optimizer.build(each.trainable_variables)
    before = values_of(model)
    fit(twin, GradientAccumulationCallback(2))
    return model, before, values_of(twin)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_and_nothing_is_lost(name, model):
    """A whole sentence; and the model trains as if it had not been called."""
    model, before, after = model
    call, error, message = BAD_CALLS[name]
    set_values(model, before)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(model)
    if name != "accumulate-in-fit":
        # (There the fit had made its update.)
        for mine, value in zip(values_of(model), before, strict=True):
            np.testing.assert_array_equal(mine, value)
    set_values(model, before)
    fit(model, GradientAccumulationCallback(2))
    for mine, value in zip(values_of(model), after, strict=True):
        np.testing.assert_array_equal(mine, value)


def own_accumulation(name="SGD", **options):
    return getattr(keras.optimizers, name)(
        gradient_accumulation_steps=2, **options
    )


def compiled_anew(make_optimizer, call):
    """A call on a model of its own, which then trains with another one."""

    def run():
        model = compiled()
        model.compile(make_optimizer(), "mse")
        weights = model.get_weights()
        try:
            call(model)
        finally:
            np.testing.assert_array_equal(weights[0], model.get_weights()[0])
            model.compile("sgd", "mse")
            fit(model, GradientAccumulationCallback(2))
            assert int(model.optimizer.iterations) == 3

    return run


ACCUMULATES = (
    "The optimizer must not accumulate gradients itself. Received: SGD with "
    "gradient_accumulation_steps=2. Leave that argument out, and have "
    "schedules count updates."
)
NO_OPTIMIZER = (
    "The model must have an optimizer to accumulate gradients for. Received: "
    "optimizer=None. Pass one to `compile`."
)
BAD_OPTIMIZERS = {
    "plain": (own_accumulation, of(2), ACCUMULATES),
    "in-accumulate": (own_accumulation, block(2), ACCUMULATES),
    "in-loss-scale": (
        lambda: keras.optimizers.LossScaleOptimizer(own_accumulation()),
        of(2),
        ACCUMULATES,
    ),
    "in-multi": (
        lambda: keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(own_accumulation())
        ),
        of(2),
        ACCUMULATES,
    ),
    "none": (lambda: None, of(2), NO_OPTIMIZER),
    "none-in-accumulate": (lambda: None, block(2), NO_OPTIMIZER),
    "skip_nonfinite-beside-loss-scale": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        of(2, skip_nonfinite=True),
        "`skip_nonfinite` must not be used with a `LossScaleOptimizer`, which "
        "has to see an overflow to lower its scale. Received: "
        "skip_nonfinite=True and a LossScaleOptimizer. Leave one of them out.",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_a_bad_optimizer_is_refused(name):
    """A whole sentence; and with another one the model trains."""
    if name == "in-multi" and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("newer Keras only")
    make_optimizer, call, message = BAD_OPTIMIZERS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled_anew(make_optimizer, call)()


def test_something_else_than_a_model_is_refused():
    """At the call, not first at the `with`; as bad steps are."""
    message = r"^`model` must be a `keras.Model`. Received: model='m' \(str\).$"
    with pytest.raises(TypeError, match=message):
        accumulate("m", 2)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError):
        accumulate(model, 0)


def test_an_uncompiled_model_is_refused():
    """There is no optimizer; once it is compiled it trains."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(
        ValueError,
        match="^The model must be compiled to accumulate gradients. Received: "
        "a Sequential that is not. Call `compile` first.$",
    ):
        block(2)(model)
    model.compile("sgd", "mse")
    block(2, lambda model: model.train_on_batch(X, Y))(model)
    assert int(model.optimizer.iterations) == 1


NOTHING = (
    "`apply` must follow an `add`: a window without micro-batches has no "
    "gradient. Received: nothing since the last `apply`."
)
BAD_ADDS = {
    "more-gradients": (
        lambda sums, variable: sums.add([[1.0], [1.0]], [variable], 1.0),
        "`gradients` must be as many as `variables`. Received: 2 gradients "
        "and 1 variables.",
    ),
    "another-variable": (
        lambda sums, variable: sums.add(
            [[1.0]], [keras.Variable([0.0], name="other")], 1.0
        ),
        "`variables` must be those that the optimizer was built for. "
        "Received: 'other', which is not among them. Use another optimizer, "
        "in a `GradientAccumulator` of its own.",
    ),
    "another-shape": (
        lambda sums, variable: sums.add(
            [ops.array([1.0, 2.0])], [variable], 1.0
        ),
        "A gradient must have the shape of its variable. Received: one of "
        "shape (2,) for 'mine', of shape (1,).",
    ),
    "weight-none-after-a-number": (
        lambda sums, variable: sums.add([[1.0]], [variable], None),
        "`weight` must be `None` for all micro-batches or for none: losses "
        "are sums or means. Received: both.",
    ),
}


def moved(sums, variable):
    before = float(variable.numpy()[0])
    sums.apply()
    return before - float(variable.numpy()[0])


@pytest.mark.parametrize("name", BAD_ADDS)
def test_a_bad_add_adds_nothing(name):
    """A whole sentence; and the window is what it was."""
    call, message = BAD_ADDS[name]
    variable = keras.Variable([0.0], name="mine")
    sums = GradientAccumulator(keras.optimizers.SGD(1.0))
    sums.add([ops.array([3.0])], [variable], 1.0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(sums, variable)
    assert int(sums.count) == 1 and moved(sums, variable) == 3.0


def test_gradients_and_variables_the_other_way_round_are_refused():
    """As `zip` in the loops of some libraries has them."""
    variable = keras.Variable([0.0])
    sums = GradientAccumulator(keras.optimizers.SGD(1.0))
    with pytest.raises(
        TypeError,
        match="`add` must be called with gradients and then variables. "
        "Received: them the other way round. Write `add\\(gradients, "
        "variables, weight=...\\)`.",
    ):
        sums.add([variable], [ops.array([1.0])], 1.0)


def test_a_model_of_legacy_keras_is_refused():
    """By name: it looks like one of Keras 3."""
    legacy = type("Model", (), {"__module__": "tf_keras.src.engine.training"})
    with pytest.raises(
        TypeError,
        match="`model` must be a `keras.Model` of Keras 3. Received: a Model "
        "of the legacy package `tf_keras`.",
    ):
        accumulate(legacy(), 2)


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=needs_graphs)],
    ids=["eager", "graph"],
)
def test_an_apply_without_an_add_is_refused(compiled):
    """At first and after another `apply`; the next window is right."""
    variable = keras.Variable([0.0])
    sums = GradientAccumulator(keras.optimizers.SGD(1.0))
    with pytest.raises(RuntimeError, match=f"^{NOTHING}$"):
        sums.apply()
    apply, error, message = sums.apply, RuntimeError, f"^{NOTHING}$"
    sums.add([ops.array([3.0])], [variable], 1.0)
    if compiled:
        # TensorFlow adds where in the graph it happened.
        apply, message = tf.function(apply), re.escape(NOTHING)
        error = tf.errors.InvalidArgumentError
    apply()
    with pytest.raises(error, match=message):
        apply()
    sums.add([ops.array([5.0])], [variable], 1.0)
    assert moved(sums, variable) == 5.0
    assert int(sums.optimizer.iterations) == 2


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: "sgd",
            TypeError,
            "`optimizer` must be a `keras.optimizers.Optimizer`. Received: "
            "optimizer='sgd' (str).",
        ),
        (own_accumulation, ValueError, ACCUMULATES),
    ],
    ids=["a-name", "accumulates-itself"],
)
def test_a_bad_optimizer_of_an_accumulator(make, error, message):
    """Refused before anything is summed."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        GradientAccumulator(make())


def test_numpy_integers_are_integers():
    """`steps` may come out of an array."""
    steps = GradientAccumulationCallback(np.int32(4)).steps
    assert steps == 4 and type(steps) is int


def test_another_backend(monkeypatch):
    """Said at once, in one sentence."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(
        RuntimeError,
        match=r"^Gradients are accumulated on the Keras backends tensorflow, "
        r"jax, torch only\. Received: backend='numpy'\. Set the environment "
        r"variable `KERAS_BACKEND` to one of them\.$",
    ):
        GradientAccumulationCallback(2)
