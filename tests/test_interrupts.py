"""Law 5: a fit that is interrupted anywhere leaves nothing behind."""

import gc
import weakref

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback, accumulate
from tests.backends import (
    BACKEND,
    error_in_a_step,
    error_in_the_data,
    needs_errors_at_once,
    of_unknown_length,
    only_on,
    out_of_memory,
)
from tests.layers import Failing
from tests.profiles import nightly
from tests.recorders import Stop
from tests.reference import Problem, build_model, data, set_values, values_of

PROBLEM = Problem(epochs=1, examples=22, optimizer="SGD")
X, Y, _ = data(PROBLEM)
HOOKS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_batch_end",
    "on_epoch_end",
    "on_train_end",
]


def built():
    """A model with momentum, so that the state of its optimizer matters."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            Failing(),
            # (PyTorch has random numbers of its own for one without a seed.)
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def pair():
    """A model to interrupt, and a twin that never saw kaccum."""
    return built(), built()


def saved(model):
    saved = [*model.trainable_variables, *model.optimizer.variables]
    return [v.numpy() for v in saved]


def assert_equal(mine, others):
    for array, other in zip(mine, others, strict=True):
        np.testing.assert_array_equal(array, other)


def fit(model, callbacks=(), batch_size=4, **options):
    options = {"shuffle": False, "verbose": 0, **options}
    callbacks = list(callbacks)
    return model.fit(X, Y, batch_size, callbacks=callbacks, **options).history


def assert_plain(pair, tmp_path):
    """Every use of the model gives bit for bit what the twin's does."""
    model, twin = pair
    before = model.get_weights()
    # Evaluating and saving must not apply the open window.
    model.evaluate(X, Y, verbose=0)
    set_values(twin, values_of(model))
    for each in pair:
        each.save(tmp_path / f"{each is model}.keras")
    loaded = keras.saving.load_model(
        tmp_path / "True.keras", custom_objects={"Failing": Failing}
    )
    # Keras does not save the state of a dropout's seed.
    assert_equal(saved(model), saved(loaded))
    assert_equal(before, model.get_weights())
    copy = keras.models.clone_model(model)
    assert not vars(copy).keys() & {"make_train_function", "get_metrics_result"}
    for each in pair:
        # Keras 3.12 goes on from what `evaluate` left in them.
        each.reset_metrics()
    results = [
        [
            each.predict(X, verbose=0),
            each.train_on_batch(X[:4], Y[:4]),
            *fit(each, epochs=2).values(),
            each.evaluate(X, Y, verbose=0),
            *each.get_weights(),
        ]
        for each in pair
    ]
    assert_equal(*results)
    assert not vars(model).keys() & {"make_train_function"}
    # With the callback again: the twin's new window is empty as well.
    seeds = [v.numpy() for v in model.non_trainable_variables]
    for each in pair:
        for variable, seed in zip(each.non_trainable_variables, seeds):
            variable.assign(seed)
        fit(each, [GradientAccumulationCallback(3)])
    assert_equal(values_of(model), values_of(twin))


# Each hook before ours and after it, by one error and the other in turn; at
# night by both.
INTERRUPTIONS = [
    pytest.param(
        hook,
        is_first,
        error,
        marks=[nightly] if (i + is_first + is_stop) % 2 else [],
        id=f"{hook}-{'before' if is_first else 'after'}-{error!r}",
    )
    for i, hook in enumerate(HOOKS)
    for is_first in (True, False)
    for is_stop, error in enumerate([ValueError("mine"), KeyboardInterrupt()])
]


@pytest.mark.parametrize("hook, is_first, error", INTERRUPTIONS)
def test_interrupted_by_a_callback(hook, is_first, error, pair, tmp_path):
    """Law 5: in any hook of a callback before or after ours."""
    calls = []

    def fail(*_, **__):
        # In the second call, if there is one: the fifth batch.
        calls.append(hook)
        if len(calls) == (5 if "train_batch" in hook else 1):
            raise error

    other = keras.callbacks.Callback()
    setattr(other, hook, fail)
    if "batch" in hook:
        # Keras looks at the class to see whether it is called at once.
        other.__class__ = type("Fails", (type(other),), {hook: fail})
    callbacks = [other, GradientAccumulationCallback(3)]
    with pytest.raises(type(error)):
        fit(
            pair[0],
            callbacks[:: 1 if is_first else -1],
            validation_data=(X, Y),
        )
    assert_plain(pair, tmp_path)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["steps", "on_update"])
def test_interrupted_by_a_function_of_the_user(where, error, pair, tmp_path):
    """Law 5: what the user's function raises reaches the user unchanged."""

    def fail(number):
        if number == 1:
            raise error
        return 3

    options = {"steps": 3, where: fail}
    with pytest.raises(type(error)) as raised:
        fit(pair[0], [GradientAccumulationCallback(**options)], epochs=2)
    assert raised.value is error
    assert_plain(pair, tmp_path)


@pytest.mark.parametrize("kind", ["generator", "PyDataset", "adapter"])
def test_interrupted_by_the_data(kind, pair, tmp_path):
    """Law 5: the data ends with an error in the middle of a window."""

    def batches():
        yield from [(X[:4], Y[:4])] * 4
        raise ZeroDivisionError

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 9

        def __getitem__(self, i):
            return X[: 4 // (i < 4)], Y[:4]

    source = {
        "generator": batches,
        "PyDataset": Batches,
        "adapter": lambda: of_unknown_length(batches),
    }[kind]()
    with pytest.raises(error_in_the_data(ZeroDivisionError)):
        pair[0].fit(
            source, verbose=0, callbacks=[GradientAccumulationCallback(3)]
        )
    if BACKEND != "torch":
        # There Keras takes the data outside of the train function.
        assert "make_train_function" not in vars(pair[0])
    assert_plain(pair, tmp_path)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_interrupted_by_the_model(batch, pair, tmp_path):
    """Law 5: the model's own code raises, and it is given back at once."""
    if batch > 2:
        # The first window is waited for.
        needs_errors_at_once()

    class Sets(keras.callbacks.Callback):
        def on_train_batch_begin(self, number, logs=None):
            if number == batch:
                Failing.error = ValueError("from the layer")

    try:
        error = error_in_a_step(ValueError)
        with pytest.raises(error, match="from the layer"):
            fit(pair[0], [GradientAccumulationCallback(3), Sets()])
    finally:
        Failing.error = None
    assert "make_train_function" not in vars(pair[0])
    assert_plain(pair, tmp_path)


STEPS = {"steps": 3}, 4
CUT = {"micro_batch_size": 4}, 10
# How a fit is asked for, which wait is told of an error, and whether no weight
# has changed by then.
TOLD_LATE = {
    "the first micro-batch": (*STEPS, 1, True),
    "the first window": (*STEPS, 2, True),
    "the first update": (*STEPS, 3, False),
    "the epoch": (*STEPS, 4, False),
    "the first batch that is cut": (*CUT, 1, True),
    "the epoch, cut": (*CUT, 4, False),
    "the first window, skipping": (
        {"steps": 3, "skip_nonfinite": True},
        4,
        2,
        True,
    ),
}


@only_on("jax", reason="others tell of an error at once")
@pytest.mark.parametrize("when", TOLD_LATE)
def test_interrupted_by_an_error_that_is_told_late(
    when, pair, tmp_path, monkeypatch
):
    """Law 5: where JAX tells of it, which Keras would hide.

    In the first window soon enough for the weights to be what they were, after
    it at the end of the epoch.
    """
    import jax

    options, batch_size, number, is_unchanged = TOLD_LATE[when]
    waited, wait = [], jax.block_until_ready

    def late(values):
        waited.append(1)
        # (Twice: kaccum looks whether what it would give back is sound.)
        if len(waited) in (number, number + 1):
            raise out_of_memory("late")
        return wait(values)

    model = pair[0]
    before = saved(model)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", late)
        with pytest.raises(
            type(out_of_memory()), match=r"(?s)late\nkaccum: .*did not fit"
        ):
            fit(model, [GradientAccumulationCallback(**options)], batch_size)
    assert "make_train_function" not in vars(model)
    if is_unchanged:
        assert_equal(saved(model), before)
    assert_plain(pair, tmp_path)


def spoiled(arrays):
    """Arrays of JAX that are told to be none when they are read.

    They wait for a long computation, after which the host raises an error.
    """
    import jax
    import jax.numpy as jnp

    def fail(number):
        raise out_of_memory("late")

    scalar = jax.ShapeDtypeStruct((), "float32")
    long = jax.jit(lambda x: (x @ x @ x @ x)[0, 0])(jnp.ones((1500, 1500)))
    late = jax.jit(lambda x: jax.pure_callback(fail, scalar, x))(long)
    return jax.tree.map(lambda x: x + late.astype(x.dtype), arrays)


@only_on("jax", reason="others tell of an error at once")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_a_late_error_leaves(number, monkeypatch):
    """Law 5: all that the model was before the window, whichever fails."""
    from kaccum.backends.jax.runner import JaxRunner

    keras.utils.set_random_seed(0)
    stack = [keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *stack])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    before, moved, move = model.get_weights(), [], JaxRunner._moving

    def moving(self, *arguments):
        result = move(self, *arguments)
        moved.append(1)
        if len(moved) == number:
            state = self._state
            sums = [total.value for total in self._sums]
            non_trainable, metrics, sums = spoiled(
                (state.non_trainable, state.metrics, sums)
            )
            self._state = state._replace(
                non_trainable=non_trainable, metrics=metrics
            )
            for total, value in zip(self._sums, sums):
                total.value = value
        return result

    monkeypatch.setattr(JaxRunner, "_moving", moving)
    with pytest.raises((type(out_of_memory()), ValueError), match="late"):
        fit(model, [GradientAccumulationCallback(3)])
    assert_equal(model.get_weights(), before)
    fit(model, [GradientAccumulationCallback(3)])


@only_on("jax", reason="others tell of an error at once")
@pytest.mark.parametrize("way", [STEPS, CUT], ids=["steps", "cut"])
def test_an_error_of_validation_that_is_told_late(
    way, pair, tmp_path, monkeypatch
):
    """Law 5: as one of training; Keras would put it into the log."""
    import jax

    options, batch_size = way
    failing, wait = [], jax.block_until_ready

    class Fails(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            failing.append(batch)

    def late(values):
        if failing:
            raise out_of_memory("late")
        return wait(values)

    callbacks = [GradientAccumulationCallback(**options), Fails()]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", late)
        with pytest.raises(type(out_of_memory()), match="late") as told:
            fit(pair[0], callbacks, batch_size, validation_data=(X, Y))
    # What is cut is waited for at once, to say what to write.
    is_at_once = len(failing) == 1 and "`validation_batch_size=" in str(told)
    assert is_at_once == (way is CUT)
    assert "make_train_function" not in vars(pair[0])
    assert_plain(pair, tmp_path)


def test_a_function_of_the_user_may_train_and_compile_anew():
    """`on_update` in the middle of a fit, whose variables it changes."""
    model = build_model(PROBLEM)

    def train(number):
        if number == 2:
            model.train_on_batch(X[:4], Y[:4])
            model.make_train_function(force=True)

    callback = GradientAccumulationCallback(2, on_update=train)
    fit(model, [callback])
    # Six micro-batches in windows of two, and one update of its own.
    assert int(model.optimizer.iterations) == 3 + 1


@only_on("jax", reason="others tell of an error at once")
def test_weights_that_are_set_after_an_error_stay():
    """The end of the block does not give back what was there before."""
    model = built()
    set_to = [np.full(w.shape, 7.0) for w in model.get_weights()]
    with accumulate(model, 3):
        model.train_on_batch(X[:4], Y[:4])
        with pytest.raises((TypeError, ValueError)):
            model.train_on_batch(X[:4, :1], Y[:4])
        model.set_weights(set_to)
    assert_equal(model.get_weights(), set_to)


def test_compiled_after_an_interruption():
    """Law 5: a model compiled anew is a new model."""
    model, twin = build_model(PROBLEM), build_model(PROBLEM)
    stop = Stop(0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit(model, [GradientAccumulationCallback(2), stop])
    for each in (model, twin):
        each.compile("adam", "sparse_categorical_crossentropy")
        fit(each)
    assert_equal(model.get_weights(), twin.get_weights())


# PyTorch 2.11 tells it to itself, from `clear_session`.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_is_dropped_is_freed():
    """Law 5: neither a finished nor an interrupted fit keeps it alive."""

    def dropped(callbacks):
        model = build_model(PROBLEM)
        try:
            fit(model, [GradientAccumulationCallback(2), *callbacks])
        except KeyboardInterrupt:
            pass
        return weakref.ref(model)

    references = [dropped([]), dropped([Stop(0, KeyboardInterrupt())])]
    keras.backend.clear_session()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
