"""The laws under `tf.distribute`: the truth is one device's large batch."""

import dataclasses
import functools
import gc
import importlib
import itertools
import subprocess
import sys

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from kaccum import (
    GradientAccumulationCallback,
    GradientAccumulator,
    accumulate,
)
from tests.backends import needs_strategies, tf
from tests.layers import Counted, Hungry
from tests.profiles import at_night, drawn, is_nightly, nightly
from tests.recorders import Recorder, Stop, is_equal, local_values
from tests.reference import (
    Problem,
    assert_same,
    build_model,
    check,
    data,
    fit_large,
    fit_micro,
    result_of,
    set_values,
    strategy_of,
    values_of,
)
from tests.strategies import (
    ARCHITECTURES,
    OPTIMIZERS,
    OPTIONS,
    problems,
    runs_of,
)

pytestmark = needs_strategies
MIRRORED = [2, 3]
EVERY = [1, *MIRRORED]


def problem_of(replicas, **fields):
    """A problem whose first batch the replicas divide, as Keras demands.

    Its last one has a single example: the other replicas have none.
    """
    fields = {"examples": 25, "micro_batch": 2 * replicas, **fields}
    if fields.get("cut"):
        fields["micro_batch"] = 2
        fields["steps"] = 3 * replicas
    return Problem(replicas=replicas, **fields)


def assert_replicas_agree(model):
    """Bit for bit: each has made the same updates."""
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        first, *others = local_values(variable)
        for other in others:
            np.testing.assert_array_equal(first, other)


def hungry_model(execution):
    """Two replicas of it."""
    with strategy_of(2).scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), Counted(), Hungry(), keras.layers.Dense(3)]
        )
        model.compile(
            keras.optimizers.Adam(0.02, epsilon=1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            run_eagerly=execution == "eager",
        )
    return model


# Laws 1 and 2


def on_replicas(problem, replicas):
    """The problem, with a first batch that the replicas divide."""
    examples = max(problem.examples, problem.batch * replicas)
    if problem.validation:
        # Keras's own evaluation is that of a single device only if the replicas
        # divide its first batch, and for means over examples.
        examples += -examples % replicas
    return dataclasses.replace(
        problem,
        replicas=replicas,
        micro_batch=problem.micro_batch * replicas,
        examples=examples,
    )


@pytest.mark.parametrize(
    ("replicas", "name"),
    [
        (2, "adam"),
        (3, "mask-averaged"),
        (2, "sum-regularized"),
        (1, "everything-at-once"),
        *at_night(
            (replicas, name) for name in ARCHITECTURES for replicas in EVERY
        ),
    ],
)
@drawn(3)
@hypothesis.given(data=st.data())
def test_replicas_train_as_one_device(replicas, name, data):
    """Law 1, for runs drawn at random."""
    fields = {**ARCHITECTURES[name], "execution": "graph"}
    if name != "adam":
        fields["validation"] = False
    if not is_nightly():
        # TensorFlow traces the data of each epoch.
        fields["epochs"] = 1
    check(on_replicas(data.draw(runs_of(fields)), replicas))


@nightly
@pytest.mark.parametrize("execution", ["graph", "eager"])
@drawn(10)
@hypothesis.given(problem=problems(), replicas=st.sampled_from(EVERY))
def test_whole_problems_train_on_replicas(execution, problem, replicas):
    """Law 1, for problems whose architecture is drawn, too."""
    problem = dataclasses.replace(problem, execution=execution)
    if problem.validation:
        problem = dataclasses.replace(problem, kind="mean")
    check(on_replicas(problem, replicas))


@pytest.mark.parametrize(
    ("replicas", "execution", "cut", "examples"),
    [
        *((2, "graph", cut, n) for cut in (False, True) for n in (19, 24, 25)),
        (3, "graph", True, 19),
        (2, "eager", False, 25),
        *at_night(
            itertools.product(
                MIRRORED, ["graph", "eager"], [False, True], [19, 24, 25]
            )
        ),
    ],
)
def test_any_number_of_examples(examples, execution, replicas, cut):
    """Law 1: some that replicas divide, some that leave one without any."""
    problem = problem_of(
        replicas, examples=examples, execution=execution, cut=cut
    )
    micro = fit_micro(problem)
    assert_same(problem, micro, fit_large(problem))
    assert_replicas_agree(micro.model)


FEATURES = [
    {"kind": "mask", "regularizer": "l2", "seed": 1},
    {"kind": "mask_mean_with_sample_weight", "token_weights": True},
    {"kind": "sum", "regularizer": "l2"},
    {"kind": "mask", "execution": "eager", "seed": 1},
    {"kind": "sum_of_tokens"},
    {"unused": True},
    {"built": False},
    {"loss_scale": 1024.0},
    {
        "loss_scale": 1024.0,
        "options": (("use_ema", True), ("ema_overwrite_frequency", 2)),
    },
    {"steps_per_execution": 5, "unknown_length": True},
    # Replicas whose batches are all of one size know it beforehand.
    {"steps_per_execution": 5, "examples": 36},
    {"validation": True, "examples": 30},
    {"policy": "float64"},
    {"policy": "mixed_float16", "optimizer": "SGD", "loss_scale": 256.0},
]
# What has little to do with replicas, or is in another of those.
OTHER_FEATURES = [
    {"kind": "sample_weight"},
    {"kind": "class_weight"},
    {"kind": "mask", "token_weights": True},
    {"kind": "mean_with_sample_weight"},
    {"kind": "sum", "execution": "eager"},
    {"regularizer": "l1"},
    {"constraint": "max_norm"},
    {"add_loss": True},
    {"frozen": True},
    {"unused": True, "execution": "eager"},
    {"schedule": True},
    {"loss_scale": 1024.0, "options": (("use_ema", True),)},
    {"steps_per_execution": 2},
    {"unknown_length": True},
    {"policy": "bfloat16", "optimizer": "SGD"},
]


def name_of(value):
    """That of a feature's test."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items())
    return {False: "steps", True: "cut"}.get(value, str(value))


@pytest.mark.parametrize(
    ("fields", "replicas", "cut"),
    [
        # Two or three replicas in turn, both at night.
        *((f, *[(2, False), (3, True)][i % 2]) for i, f in enumerate(FEATURES)),
        *at_night(
            (fields, *each)
            for fields in FEATURES + OTHER_FEATURES
            for each in [(2, False), (3, True)]
        ),
    ],
    ids=name_of,
)
def test_feature_trains_as_on_one_device(fields, replicas, cut):
    """Laws 1 to 3, feature by feature."""
    problem = problem_of(replicas, cut=cut, **fields)
    micro = fit_micro(problem)
    assert_same(problem, micro, fit_large(problem))
    assert_replicas_agree(micro.model)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", (("global_clipnorm", 0.05),)),
        ("AdamW", (("use_ema", True), ("ema_overwrite_frequency", 2))),
        ("SGD", (("loss_scale_factor", 8.0),)),
        *at_night(itertools.product(["SGD", "AdamW"], OPTIONS[1:])),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0][0],
)
def test_every_option_acts_on_the_gradient_of_all_replicas(options, optimizer):
    """Law 3: clipping, decay, averages and scales, once an update."""
    check(problem_of(2, optimizer=optimizer, options=options))


@nightly
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_on_one_device(name):
    """Law 1, for each optimizer of Keras."""
    if name == "Muon" and keras.__version__ < "3.15":
        pytest.skip("Muon does not run on TensorFlow before Keras 3.15")
    check(problem_of(2, optimizer=name, epochs=1))


@pytest.mark.parametrize(
    ("execution", "cut"),
    [
        ("graph", False),
        ("graph", True),
        ("xla", False),
        *at_night([("xla", True), ("eager", False), ("eager", True)]),
    ],
)
def test_a_strategy_of_one_device(execution, cut):
    """Law 1, with all that a single device can do."""
    check(Problem(execution=execution, cut=cut, replicas=1))


@pytest.mark.parametrize(
    ("execution", "cut"),
    [
        ("graph", True),
        ("eager", False),
        *at_night([("graph", False), ("eager", True)]),
    ],
)
def test_a_replica_without_examples_does_nothing(cut, execution):
    """Its statistics would be those of nothing: NaN, as in Keras's own fit."""
    problem = problem_of(2, cut=cut)
    x, y, _ = data(problem)

    def fitted(callbacks):
        with strategy_of(2).scope():
            layers = [keras.Input((4,)), keras.layers.BatchNormalization()]
            model = keras.Sequential([*layers, keras.layers.Dense(3)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adam", loss, run_eagerly=execution == "eager")
        options = {"verbose": 0, "callbacks": callbacks}
        history = model.fit(x, y, problem.batch, **options).history
        state = [*model.variables, *model.optimizer.variables]
        values = [a for v in state for a in local_values(v)]
        return all(np.all(np.isfinite(a)) for a in [*values, history["loss"]])

    assert fitted([problem.callback])
    if execution == "graph":
        assert not fitted([])


def two_outputs(replicas, examples, batch_size, *callbacks):
    """A fit of a model with two losses."""
    x, y, _ = data(Problem(examples=examples))
    with strategy_of(replicas).scope():
        keras.utils.set_random_seed(0)
        first = keras.Input((4,))
        hidden = keras.layers.Dense(5, activation="tanh")(first)
        outputs = [keras.layers.Dense(3, name=n)(hidden) for n in "ab"]
        model = keras.Model(first, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), [loss, loss])
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(
        x, [y, y], batch_size, callbacks=list(callbacks), **options
    ).history
    return result_of(model, history)


def test_several_outputs():
    """Each output's log is that of the large batches."""
    ours = two_outputs(2, 24, 6, GradientAccumulationCallback(2))
    assert_same(Problem(steps=4), ours, two_outputs(0, 24, 12))


def test_several_outputs_and_a_replica_without_examples():
    """Its share of the log is none (Keras's own average is no oracle here)."""
    for callback in (
        GradientAccumulationCallback(2),
        GradientAccumulationCallback(micro_batch_size=3),
    ):
        batch_size = 12 if callback.micro_batch_size else 6
        ours, one = (
            two_outputs(replicas, 25, batch_size, callback)
            for replicas in (2, 0)
        )
        assert_same(Problem(steps=4), ours, one)


# Law 3 and the number of all-reduces


def test_nothing_changes_inside_a_window():
    """Law 3: on no replica, bit for bit."""
    states = Recorder()
    problem = Problem(
        optimizer="AdamW",
        options=(("use_ema", True), ("weight_decay", 0.1)),
        constraint="unit_norm",
        replicas=2,
        epochs=1,
    )
    fit_micro(problem, callbacks=[states, problem.callback])
    for i in range(1, len(states.batches)):
        is_same = is_equal(states.batches[i - 1], states.batches[i])
        assert is_same == ((i + 1) % 3 != 0), i


def test_overflow_on_one_replica_skips_one_update():
    """Law 3: and halves the scale once, on all of them."""
    problem = Problem(loss_scale=1024.0, examples=24, replicas=2)
    x, y, _ = data(problem)
    x[5] = np.inf
    states = Recorder()
    model, twin = build_model(problem), build_model(problem.truth)
    options = {"shuffle": False, "verbose": 0}
    callbacks = [states, GradientAccumulationCallback(3)]
    model.fit(x, y, batch_size=4, callbacks=callbacks, **options)
    twin.fit(x, y, batch_size=12, **options)
    assert local_values(model.optimizer.dynamic_scale) == [512.0, 512.0]
    assert local_values(model.optimizer.iterations) == [1, 1]
    assert int(twin.optimizer.iterations) == 1
    assert is_equal(states.batches[0], states.batches[4])
    assert_replicas_agree(model)
    np.testing.assert_allclose(
        model.get_weights()[0], twin.get_weights()[0], rtol=1e-5
    )


@pytest.fixture
def reductions(monkeypatch):
    """The sizes of the reductions that are run.

    Collective ones, one for each replica; and those to one device.
    """
    sizes = []
    to_one = tf.distribute.ReductionToOneDevice
    collective_ops = importlib.import_module(
        "tensorflow.python.ops.collective_ops"
    )
    real = collective_ops.all_reduce_v2, to_one.reduce_implementation

    def counting(shape):
        size = int(np.prod(shape))
        with tf.device("CPU:0"):
            told = tf.py_function(lambda: sizes.append(size), [], [])
        return tf.control_dependencies([told])

    def all_reduce(tensor, *args, **kwargs):
        with counting(tensor.shape):
            return real[0](tf.identity(tensor), *args, **kwargs)

    def reduce(self, how, value, *args, **kwargs):
        with counting(value.values[0].shape):
            return real[1](self, how, value, *args, **kwargs)

    monkeypatch.setattr(collective_ops, "all_reduce_v2", all_reduce)
    monkeypatch.setattr(to_one, "reduce_implementation", reduce)
    return sizes


@pytest.mark.parametrize(
    ("replicas", "window", "cut"),
    [
        (2, 4, False),
        (3, 4, True),
        *at_night(itertools.product(MIRRORED, [1, 4, 8], [False, True])),
    ],
)
def test_one_all_reduce_an_update(reductions, replicas, window, cut):
    """None for a micro-batch, one for the update: all sums in one tensor."""
    problem = Problem(
        examples=16 * 12, micro_batch=12, steps=window, epochs=1
    )
    problem = dataclasses.replace(problem, cut=cut, replicas=replicas)
    seen = []
    look = keras.callbacks.LambdaCallback(
        # What an epoch needs once is not counted.
        on_train_batch_begin=lambda batch, logs: batch or reductions.clear(),
        on_train_batch_end=lambda batch, logs: seen.append(len(reductions)),
    )
    # One that is compiled while its reductions are counted.
    model = build_model(problem)
    result = fit_micro(problem, model, [problem.callback, look])
    each = 1 if cut else window
    updates = [(i + 1) // each for i in range(len(seen))]
    # A collective is run by each replica.
    runs = 2 if replicas == 2 else 1
    assert seen == [runs * count for count in updates]
    weights = sum(int(np.prod(w.shape)) for w in result.model.weights)
    # Two numbers of the window, and four for the one that is logged.
    assert set(reductions[: seen[-1]]) == {weights + 2 + 4}


def test_plain_keras_reduces_at_each_batch(reductions):
    """So the test above can fail."""
    problem = Problem(examples=16, replicas=2, epochs=1)
    fit_micro(problem, build_model(problem), [])
    assert len(reductions) >= 2 * 4


@pytest.mark.parametrize(("replicas", "count"), [(2, 2), (3, 1)])
def test_reductions_are_counted(reductions, replicas, count):
    """Of both kinds, wherever they come from."""
    strategy = strategy_of(replicas)

    def run():
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones(5))

    tf.function(lambda: strategy.run(run))()
    assert reductions == [5] * count


def test_each_replica_has_its_own_sums():
    """What they add up stays with them until the update."""
    problem = Problem(replicas=2, epochs=1, examples=8)
    sums = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            step = self.model.train_function.__self__._step
            for total in step.sums.gradients[0]._totals:
                sums.append([part.numpy() for part in total.values])
                devices = {part.device[-5:] for part in total.values}
                assert devices == {"CPU:0", "CPU:1"}

    fit_micro(problem, callbacks=[problem.callback, Look()])
    assert all(not np.array_equal(*pair) for pair in sums[:6:2])


# Law 4


@pytest.mark.parametrize("unknown_length", [False, True])
def test_an_epoch_ends_with_no_open_window(unknown_length):
    """Law 4: the short window comes before validation and callbacks."""
    states = Recorder()
    problem = Problem(
        validation=True, replicas=2, unknown_length=unknown_length
    )
    fit_micro(problem, callbacks=[states, problem.callback])
    assert states.validations == states.epochs == [2, 4]


# Law 5


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (4, KeyboardInterrupt()),
        *at_night(
            [
                (0, ValueError("mine")),
                (0, KeyboardInterrupt()),
                (4, ValueError("mine")),
            ]
        ),
    ],
)
def test_an_interrupted_fit_leaves_nothing_behind(error, batch):
    """Law 5: what follows is bit for bit what a twin does."""
    problem = Problem(epochs=1, replicas=2)
    x, y, _ = data(problem)

    model, twin = build_model(problem), build_model(problem)
    with pytest.raises(type(error)):
        fit_micro(problem, model, [problem.callback, Stop(batch, error)])
    before = model.get_weights()
    model.evaluate(x[:16], y[:16], batch_size=16, verbose=0)
    assert is_equal(before, model.get_weights())
    with strategy_of(2).scope():
        twin.optimizer.build(twin.trainable_variables)
    set_values(twin, values_of(model))
    for each in (model, twin):
        each.train_on_batch(x[:4], y[:4])
        each.fit(x[:16], y[:16], batch_size=4, shuffle=False, verbose=0)
        assert not vars(each).keys() & {"make_train_function"}
    assert is_equal(model.get_weights(), twin.get_weights())
    for each in (model, twin):
        fit_micro(problem, each)
    assert is_equal(model.get_weights(), twin.get_weights())


@pytest.mark.parametrize("execution", ["graph", "eager"])
def test_an_error_on_one_replica_gives_the_model_back(execution):
    """Law 5: at once, whatever the others were doing."""
    x, y, _ = data(Problem(examples=8))
    Hungry.feed(1, replica=1, error=ZeroDivisionError("mine"))
    try:
        model = hungry_model(execution)
        with pytest.raises((ZeroDivisionError, tf.errors.OpError)):
            model.fit(
                x,
                y,
                4,
                verbose=0,
                callbacks=[GradientAccumulationCallback(2)],
            )
    finally:
        Hungry.feed(None)
    assert not vars(model).keys() & {"make_train_function"}
    assert not vars(model.optimizer).keys() & {"apply"}


# Law 6


@nightly
def test_saved_models_are_plain(tmp_path):
    """Law 6: and need no strategy either."""
    path = str(tmp_path / "model.keras")
    problem = Problem(replicas=2)
    callbacks = [keras.callbacks.ModelCheckpoint(path), problem.callback]
    result = fit_micro(problem, callbacks=callbacks)
    program = f"""
import sys, warnings
sys.modules["kaccum"] = None  # importing it would fail
import keras, numpy
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")
loaded = keras.saving.load_model({path!r})
variables = [*loaded.variables, *loaded.optimizer.variables]
numpy.savez({str(tmp_path / "loaded.npz")!r}, *[v.numpy() for v in variables])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    loaded = np.load(tmp_path / "loaded.npz")
    saved = [*result.weights, *result.state]
    assert is_equal(saved, [loaded[name] for name in loaded.files])


@nightly
def test_an_interrupted_run_is_resumed(tmp_path):
    """Law 6: `BackupAndRestore` goes on as if nothing had happened."""
    problem = Problem(replicas=2, epochs=3)

    def fail(epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt

    fails = keras.callbacks.LambdaCallback(on_epoch_begin=fail)
    backup = str(tmp_path / "backup")
    model = build_model(problem)
    with pytest.raises(KeyboardInterrupt):
        saves = keras.callbacks.BackupAndRestore(backup)
        fit_micro(problem, model, [saves, problem.callback, fails])
    model.make_train_function()
    saves = keras.callbacks.BackupAndRestore(backup)
    # Keras keeps on the model where it resumed.
    resumed = fit_micro(
        problem, build_model(problem), [saves, problem.callback]
    )
    whole = fit_micro(problem)
    assert resumed.iterations == whole.iterations
    assert is_equal(resumed.weights, whole.weights)
    assert is_equal(resumed.state, whole.state)


# Laws 7 to 10


@pytest.mark.parametrize("examples", [25, *at_night([24])])
def test_steps_of_one_is_the_fit_on_one_device(examples):
    """Law 7: also where Keras's own fit is not."""
    options = (("global_clipnorm", 0.05),)
    problem = problem_of(2, steps=1, examples=examples, options=options)
    check(problem)
    with pytest.raises(AssertionError):
        assert_same(
            problem, fit_micro(problem, callbacks=[]), fit_large(problem)
        )


def test_sums_of_half_precision_are_float32():
    """Law 9: 300 steps that bfloat16 cannot see one by one."""
    with strategy_of(2).scope():
        variable = keras.Variable(np.ones(1), dtype="bfloat16")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([variable])
        accumulator = GradientAccumulator(optimizer)
    gradient = tf.constant([2.0**-9], "bfloat16")

    @tf.function
    def add():
        strategy_of(2).run(
            lambda: accumulator.add([gradient], [variable], 1.0)
        )

    for _ in range(300):
        add()
    (total,) = accumulator._sums._totals
    assert [part.dtype for part in total.values] == [tf.float32] * 2
    assert [float(part[0]) for part in total.values] == [300 * 2.0**-9] * 2


@pytest.mark.parametrize("cut", [False, *at_night([True])])
def test_nothing_is_compiled_twice(cut):
    """Law 10: not in a second fit, nor by another length of window."""
    traces = []

    class Counting(keras.Model):
        def train_step(self, data):
            traces.append("add")
            return super().train_step(data)

    class CountingAdam(keras.optimizers.Adam):
        def apply(self, grads, trainable_variables=None):
            traces.append("update")
            return super().apply(grads, trainable_variables)

    with strategy_of(2).scope():
        inputs = keras.Input((4,))
        model = Counting(inputs, keras.layers.Dense(3)(inputs))
        model.compile(CountingAdam(), "sparse_categorical_crossentropy")
    x, y, _ = data(Problem(examples=24))

    def fit(steps, epochs=2):
        callback = GradientAccumulationCallback(steps)
        batch_size = 4
        if cut:
            callback = GradientAccumulationCallback(micro_batch_size=2)
            batch_size = 4 * steps
        model.fit(x, y, batch_size, epochs, 0, callbacks=[callback])

    fit(2)
    first = len(traces)
    for steps in (2, 6, 3):
        fit(steps)
    if not cut:
        fit(4)
        fit(1)
    assert {"add", "update"} == set(traces) and len(traces) == first


# `micro_batch_size` is per replica.


class Counts(keras.Model):
    """Keeps the number of examples of each micro-batch, replica by replica."""

    seen = []

    def train_step(self, data):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group

        def tell(replica, x):
            Counts.seen.append((int(replica), len(x)))
            return np.float32(0)

        with tf.device("CPU:0"):
            told = tf.numpy_function(tell, [replica, data[0]], tf.float32)
        with tf.control_dependencies([told]):
            return super().train_step(data)


@functools.cache
def counting_model(replicas):
    """A model that is lent again and again, and its first state."""
    with strategy_of(replicas).scope():
        inputs = keras.Input((4,))
        model = Counts(inputs, keras.layers.Dense(3)(inputs))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        model.optimizer.build(model.trainable_variables)
    return model, values_of(model)


@pytest.mark.parametrize(
    ("examples", "size", "replicas", "expected"),
    [
        (24, 6, 0, [[6, 6, 6, 6]]),
        (24, 6, 2, [[6, 6]] * 2),
        (24, 6, 3, [[4, 4]] * 3),
        (24, 12, 2, [[12]] * 2),
        (24, 64, 3, [[8]] * 3),
        (20, 6, 3, [[4, 3], [4, 3], [3, 3]]),
        (7, 2, 3, [[2, 1], [2, 1], [1, 0]]),
        (1, 1, 2, [[1], [0]]),
    ],
)
def test_the_same_script_on_any_hardware(
    examples, size, replicas, expected, capsys
):
    """As many micro-batches as the replicas need, whatever does not divide."""
    x, y, _ = data(Problem(examples=24 + examples))
    model, first = counting_model(replicas)
    set_values(model, first)
    Counts.seen.clear()
    callback = GradientAccumulationCallback(micro_batch_size=size)
    model.fit(x, y, 24, verbose=2, shuffle=False, callbacks=[callback])
    said = capsys.readouterr().out.splitlines()[0]
    sizes = [
        [count for replica, count in Counts.seen if replica == each]
        for each in range(max(replicas, 1))
    ]
    # Of the second batch.
    count = len(expected[0])
    assert [each[-count:] for each in sizes] == expected
    *_, before = sizes[0][:-count]
    number = sizes[0][:-count].count(before)
    assert f"{number} micro-batch" in said and f" of {before}" in said
    assert ("on each of" in said) == (replicas > 1)
    inputs = keras.Input((4,))
    twin = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    twin.compile(keras.optimizers.SGD(0.1), model.loss, run_eagerly=True)
    twin.optimizer.build(twin.trainable_variables)
    set_values(twin, first)
    twin.fit(x, y, 24, verbose=0, shuffle=False)
    np.testing.assert_allclose(
        model.get_weights()[0], twin.get_weights()[0], rtol=1e-5
    )


@pytest.mark.parametrize("execution", ["graph", *at_night(["eager"])])
def test_auto_halves_on_all_replicas_together(execution):
    """One that runs out of memory has all of them try again."""
    x, y, _ = data(Problem(examples=24))

    def trained(size, limit):
        Hungry.feed(limit, replica=1)
        model = hungry_model(execution)
        callback = GradientAccumulationCallback(micro_batch_size=size)
        options = {"epochs": 2, "verbose": 0, "shuffle": False}
        history = model.fit(x, y, 24, callbacks=[callback], **options).history
        assert_replicas_agree(model)
        counted = model.non_trainable_variables[0]
        assert callback.micro_batch_size == 3
        return result_of(model, history), local_values(counted)

    # Each attempt that fails looks for garbage: among what is new.
    gc.freeze()
    try:
        auto, counted = trained("auto", 4)
        assert Hungry.failed == [12, 6]
        three, expected = trained(3, None)
    finally:
        gc.unfreeze()
        Hungry.feed(None)
    assert counted == expected
    assert_same(Problem(steps=4), auto, three)


# The other ways in.


def test_skip_nonfinite_leaves_out_what_one_replica_saw():
    """Its examples only: a micro-batch is what one pass sees."""
    problem = Problem(examples=24, replicas=2, epochs=1)
    x, y, _ = data(problem)
    bad = x.copy()
    bad[5] = np.nan  # of replica 0: examples 4 and 5
    model = build_model(problem)
    callback = GradientAccumulationCallback(3, skip_nonfinite=True)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            logs["skipped_micro_batches"]
        )
    )
    history = model.fit(
        bad, y, 4, verbose=0, shuffle=False, callbacks=[callback, look]
    ).history
    assert seen == [0, 1, 1, 1, 1, 1]
    assert history.pop("skipped_micro_batches") == [1]
    twin = build_model(problem.truth)
    twin.optimizer.build(twin.trainable_variables)
    keep = np.delete(np.arange(24), [4, 5])
    parts = [keep[:10], keep[10:]]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return x[parts[i]], y[parts[i]]

    plain = twin.fit(Batches(), verbose=0, shuffle=False).history
    assert_same(problem, result_of(model, history), result_of(twin, plain))


def test_train_on_batch_accumulates():
    """As Keras has it: each replica is given the whole batch."""
    problem = Problem(replicas=2)
    x, y, _ = data(problem)
    model, twin = build_model(problem), build_model(problem.truth)
    twin.optimizer.build(twin.trainable_variables)
    with accumulate(model, 3):
        for i in range(4):
            model.train_on_batch(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
    twin.train_on_batch(x[:12], y[:12])
    twin.train_on_batch(x[12:16], y[12:16])
    assert_same(
        problem, *(result_of(m, {"loss": [1.0]}) for m in (model, twin))
    )


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_loop_of_ones_own(is_compiled):
    """`add` and `apply` are called by the replicas."""
    strategy = strategy_of(2)
    problem = Problem(replicas=2, optimizer="AdamW", epochs=1)
    x, y, _ = data(problem)
    model = build_model(problem)
    with strategy.scope():
        accumulator = GradientAccumulator(model.optimizer)

    def step(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                y, model(x), from_logits=True
            )
            size = tf.cast(tf.size(losses), tf.float32)
            loss = tf.reduce_sum(losses) / size
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        accumulator.add(gradients, variables, size)

    def add(x, y):
        strategy.run(step, args=(x, y))

    def apply():
        strategy.run(accumulator.apply)

    if is_compiled:
        add, apply = tf.function(add), tf.function(apply)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(6)
    for i, batch in enumerate(
        strategy.experimental_distribute_dataset(batches)
    ):
        add(*batch)
        if i in (1, 2):
            apply()
    assert_replicas_agree(model)
    assert_same(
        problem,
        result_of(model, {"loss": [1.0]}),
        dataclasses.replace(fit_large(problem), history={"loss": [1.0]}),
    )


# What does not work is refused.


def test_a_gradient_that_is_a_value():
    """Of float8 scales the largest would have to be found."""
    with strategy_of(2).scope():
        scale = keras.Variable(np.ones(()))
        scale.overwrite_with_gradient = True
        accumulator = GradientAccumulator(keras.optimizers.SGD())

    def add():
        accumulator.add([tf.ones(())], [scale], 1.0)

    with pytest.raises(
        RuntimeError,
        match=r"^Variables that are overwritten by their gradients must be on "
        r"one device to be accumulated\. Received: .*, on 2 replicas\.$",
    ):
        strategy_of(2).run(add)


def refused(model):
    callback = GradientAccumulationCallback(2)
    callback.set_model(model)
    with pytest.raises(RuntimeError) as error:
        callback.on_train_begin()
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["ParameterServerStrategy", "MultiWorkerMirroredStrategy"]
)
def test_other_strategies(name):
    """A sentence, before anything is changed."""
    kind = getattr(tf.distribute, name)
    strategy = kind.__new__(kind)

    class Model(keras.Sequential):
        distribute_strategy = strategy

    model = Model()
    model.compile("sgd", "mse")
    assert refused(model) == (
        "The model must train on one device, or under a "
        "`tf.distribute.MirroredStrategy`, for its gradients to be "
        f"accumulated. Received: a {kind.__name__}."
    )


def test_xla_on_several_replicas():
    """TensorFlow cannot, with or without kaccum."""
    model = build_model(Problem(replicas=2, execution="xla"))
    assert refused(model) == (
        "XLA compiles for one device only (TensorFlow 2.21). Received: "
        "jit_compile=True and a MirroredStrategy of 2 replicas. Leave "
        "`jit_compile` out of `compile`."
    )
