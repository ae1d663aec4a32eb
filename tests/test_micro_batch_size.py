"""`micro_batch_size`: each batch of `fit` is cut, and "auto" finds the size.

That it trains as the large batch is in test_same_fit.py, for both ways.
"""

import functools
import gc
import importlib
import itertools
import re

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from kaccum import GradientAccumulationCallback
from kaccum.backends import backend
from kaccum.fit import micro_batches
from kaccum.fit.micro_batches import MicroBatchSize
from kaccum.fit.session import Session
from tests.backends import (
    BACKEND,
    EXECUTIONS,
    attempts,
    compile_options,
    eagerly,
    error_in_a_step,
    error_in_the_data,
    needs_graphs,
    needs_sparse,
    of_unknown_length,
    out_of_memory,
    tf,
)
from tests.layers import Hungry, Watched, stateful
from tests.profiles import at_night, drawn
from tests.reference import (
    Problem,
    assert_same,
    build_model,
    data,
    fit_micro,
    result_of,
    set_values,
    values_of,
)

# XLA runs no functions of the host on TensorFlow.
WAYS = {
    "tensorflow": ["graph", "eager"],
    "jax": ["xla", "eager"],
    "torch": ["eager"],
}[BACKEND]
EXAMPLES, FEATURES = 45, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(EXAMPLES, FEATURES)).astype("float32")
Y = RNG.integers(0, 3, EXAMPLES)


# How a batch is cut: plain numbers.


@drawn(100)
@hypothesis.given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=4).filter(any),
    st.integers(1, 600),
)
def test_parts_are_few_and_equal(examples, most):
    """As few as possible, then as equal as possible, on each replica."""
    parts = MicroBatchSize(most).parts_of(examples)
    assert (len(parts) - 1) * most < max(examples)
    for count, sizes in zip(examples, zip(*parts, strict=True), strict=True):
        assert sum(sizes) == count
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert sizes == tuple(sorted(sizes, reverse=True))


@drawn(100)
@hypothesis.given(st.lists(st.integers(1, 300), min_size=1), st.integers(1, 99))
def test_auto_halves_until_it_fits(batches, limit):
    """Never asks for as much as what failed, and fails only as often."""
    size, failed = MicroBatchSize("auto"), []
    assert size.size == "auto"
    for examples in batches:
        while (part := size.parts_of([examples])[0][0]) > limit:
            assert part < min(failed, default=part + 1)
            failed.append(part)
            assert size.halve(part)
        size.fits(part)
        assert size.size <= limit
    assert 2 * len(failed) <= 2 * int(np.ceil(np.log2(max(batches)))) + 2
    if failed:
        assert size.size <= -(-failed[-1] // 2)


def test_one_example_is_not_halved():
    """There is nothing smaller to try."""
    assert not MicroBatchSize("auto").halve(1)


# What `fit` shows is the large batch.


@pytest.mark.parametrize(
    ("execution", "steps_per_execution"),
    [
        (EXECUTIONS[0], 1),
        (EXECUTIONS[0], 2),
        (EXECUTIONS[-1], 1),
        *at_night(itertools.product(EXECUTIONS, [1, 2])),
    ],
)
def test_batches_may_change_their_size(execution, steps_per_execution):
    """Law 1, also where the length of the data is unknown."""
    problem = Problem(
        execution=execution, steps_per_execution=steps_per_execution
    )
    ends = np.cumsum([5, 9, 1, 7, 3])

    def batches():
        for start, end in itertools.pairwise([0, *ends]):
            yield X[start:end], Y[start:end]

    class Known(keras.utils.PyDataset):
        def __len__(self):
            return len(ends)

        def __getitem__(self, i):
            return list(batches())[i]

    # Plain Keras counts an update too many where it finds the data to end, and
    # with `steps_per_execution` trains on too many batches.
    plain = build_model(problem.truth)
    ours = build_model(problem)
    results = []
    for model, source, callbacks in (
        (ours, of_unknown_length(batches), [cut(3)]),
        (plain, Known(), []),
    ):
        model.optimizer.build(model.trainable_variables)
        history = model.fit(
            source, epochs=2, verbose=0, shuffle=False, callbacks=callbacks
        ).history
        results.append(result_of(model, history))
    assert results[0].iterations == 2 * len(ends)
    assert_same(problem, *results)


def test_logs_are_those_of_whole_batches():
    """Batch by batch: every number, and as many."""
    problem = Problem(micro_batch=2, cut=True)

    def logs_of(run, *callbacks):
        seen = []
        tell = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
        )
        run(tell, *callbacks)
        return seen

    def plain(*callbacks):
        x, y, _ = data(problem)
        build_model(problem).fit(
            x,
            y,
            batch_size=problem.large_batch,
            epochs=2,
            verbose=0,
            shuffle=False,
            callbacks=list(callbacks),
        )

    micro = logs_of(
        lambda *callbacks: fit_micro(problem, callbacks=list(callbacks)),
        problem.callback,
    )
    large = logs_of(plain)
    assert len(micro) == len(large) == 6
    for mine, other in zip(micro, large, strict=True):
        assert mine.keys() == other.keys()
        for name in other:
            assert mine[name] == pytest.approx(other[name], rel=1e-6)


def test_every_leaf_is_cut():
    """Nested inputs, several outputs, a sample weight for each."""
    problem = Problem(micro_batch=4, steps=3)
    rng = np.random.default_rng(1)
    inputs = {"a": X, "b": X[:, :2], "c": X[:, 2:]}
    targets = {"p": X[:, :1], "q": X[:, 1:]}
    weights = {
        "p": rng.uniform(0, 2, EXAMPLES).astype("float32"),
        "q": np.ones(EXAMPLES, "float32"),
    }
    results = []
    for callbacks in ([cut(4)], []):
        keras.utils.set_random_seed(0)
        first = {
            name: keras.Input(array.shape[1:], name=name)
            for name, array in inputs.items()
        }
        hidden = keras.layers.Concatenate()(list(first.values()))
        hidden = keras.layers.Dense(5, activation="tanh")(hidden)
        outputs = {
            "p": keras.layers.Dense(1, name="p")(hidden),
            "q": keras.layers.Dense(3, name="q")(hidden),
        }
        model = keras.Model(first, outputs)
        model.compile("adam", {"p": "mse", "q": "mae"})
        model.optimizer.build(model.trainable_variables)
        if not callbacks:
            eagerly(model)
        history = model.fit(
            inputs,
            targets,
            15,
            sample_weight=weights,
            epochs=2,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
        ).history
        results.append(result_of(model, history))
    assert_same(problem, *results)


@needs_sparse
@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_ragged_and_sparse_inputs_are_cut(kind):
    """As many other arrays."""
    if kind == "sparse":
        x, options = tf.sparse.from_dense(np.eye(10, 6, dtype="float32")), {}
    else:
        lengths = [2, 1, 3, 1, 1, 2, 2, 1, 1, 3]
        x = tf.RaggedTensor.from_row_lengths(tf.range(17) % 5, lengths)
        options = {"dtype": "int32"}
    batches = tf.data.Dataset.from_tensor_slices((x, tf.range(10.0)[:, None]))
    results = []
    for callbacks in ([cut(3)], []):
        keras.utils.set_random_seed(0)
        shape = (6,) if kind == "sparse" else (None,)
        first = keras.Input(shape, **{kind: True}, **options)
        hidden = first
        if kind == "ragged":
            hidden = keras.layers.Embedding(5, 3)(hidden)
            hidden = keras.ops.mean(hidden, axis=1)
        model = keras.Model(first, keras.layers.Dense(1)(hidden))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.optimizer.build(model.trainable_variables)
        history = model.fit(
            batches.batch(7), epochs=2, verbose=0, callbacks=callbacks
        ).history
        results.append(result_of(model, history))
    assert_same(Problem(steps=3), *results)


def test_updates_are_batches():
    """`on_update` counts them; `skip_nonfinite` leaves micro-batches out."""
    x = X[:25].copy()
    x[:2] = np.nan
    x[10:20] = np.nan
    updates = []
    callback = GradientAccumulationCallback(
        micro_batch_size=2, skip_nonfinite=True, on_update=updates.append
    )
    model, twin = build_model(Problem()), build_model(Problem().truth)
    model.fit(x, Y[:25], 10, verbose=0, shuffle=False, callbacks=[callback])
    # The first batch without its bad examples; the second would be empty.
    for part in (slice(2, 10), slice(20, 25)):
        twin.train_on_batch(X[part], Y[part])
    assert updates == [1, 2]
    assert callback.skipped_micro_batches == 6
    assert_same(
        Problem(), *(result_of(each, {"loss": [1.0]}) for each in (model, twin))
    )


@needs_graphs
@pytest.mark.parametrize("execution", EXECUTIONS[:2])
def test_each_size_is_compiled_once(execution):
    """Law 10: a trace for each size of a micro-batch, then a general one."""
    traced = []

    class Counting(keras.Model):
        def train_step(self, data):
            traced.append(data[0].shape[0])
            return super().train_step(data)

    first = keras.Input((FEATURES,))
    model = Counting(first, keras.layers.Dense(3)(first))
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        jit_compile=execution == "xla",
    )

    def fit(size, examples):
        before = len(traced)
        x, y = X[:examples], Y[:examples]
        model.fit(x, y, 8, verbose=0, callbacks=[cut(size)])
        return traced[before:]

    assert fit(4, 24) == [4]
    assert fit(4, 24) == fit(5, 24) == []
    assert fit(2, 24) == [None]
    assert fit(3, 25) == fit(1, 23) == []


def cut(size):
    return GradientAccumulationCallback(micro_batch_size=size)


# "auto": a layer that runs out of memory.


@pytest.fixture(autouse=True)
def fed():
    """Lets the next test begin with enough memory.

    Each attempt that fails looks for garbage: among what is new.
    """
    Hungry.feed(None)
    gc.freeze()
    yield
    gc.unfreeze()
    Hungry.feed(None)


def hungry_model(execution="graph", layers=(), built=True):
    keras.utils.set_random_seed(0)
    stack = [keras.layers.Dense(6, activation="tanh"), Hungry(), *layers]
    stack.append(keras.layers.Dense(3))
    if built:
        stack.insert(0, keras.Input((FEATURES,)))
    model = keras.Sequential(stack)
    model.compile(
        keras.optimizers.Adam(0.02, epsilon=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy()],
        **compile_options(execution),
    )
    return model


def ours_in(capsys):
    """What kaccum printed."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("kaccum")]


def fit(model, callback, batch_size=10, epochs=2, *, verbose=0, **options):
    history = model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        verbose=verbose,
        shuffle=False,
        callbacks=[callback, *options.pop("callbacks", [])],
        **options,
    ).history
    return result_of(model, history)


def same(mine, other, problem=None):
    """Equal, seeds and statistics included: the slices were the same."""
    assert_same(problem or Problem(), mine, other)


# How it is compiled, which pass fails, on which batch of `fit`, and whether the
# model is built: each of them twice, all of them at night.
ATTEMPTS = [
    (WAYS[0], "forward", True, 0),
    (WAYS[0], "backward", False, 2),
    (WAYS[-1], "backward", True, 2),
    (WAYS[-1], "forward", False, 0),
    *at_night(
        itertools.product(WAYS, ["forward", "backward"], [True, False], [0, 2])
    ),
]


@pytest.mark.parametrize("execution, fails_in, built, patience", ATTEMPTS)
def test_auto_is_as_the_size_it_found(execution, fails_in, patience, built):
    """Nothing that a failed attempt touched is seen in the result."""
    Hungry.feed(4, fails_in, patience)
    callback = cut("auto")
    auto = fit(hungry_model(execution, stateful(), built), callback, 20)
    assert attempts(Hungry.failed) == [20, 10, 5]
    third = attempts([20, 10, 5, 5, 5, 3] if patience else [20, 10, 5, 3])
    assert attempts(Hungry.seen)[: len(third)] == third
    assert callback.micro_batch_size == 3
    Hungry.feed(None)
    same(auto, cut_by_three(execution, built))


@functools.cache
def cut_by_three(execution, built):
    """What those fits must end with."""
    return fit(hungry_model(execution, stateful(), built), cut(3), 20)


def test_a_failed_attempt_leaves_nothing_out():
    """With `skip_nonfinite`: counted once, when the attempt succeeds."""
    x = X[:20].copy()
    x[0] = np.nan
    Hungry.feed(4, patience=2)
    callback = GradientAccumulationCallback(
        micro_batch_size="auto", skip_nonfinite=True
    )
    log = hungry_model().fit(
        x, Y[:20], 20, verbose=0, shuffle=False, callbacks=[callback]
    )
    assert Hungry.failed == [20, 10, 5]
    assert log.history["skipped_micro_batches"] == [1]
    assert callback.skipped_micro_batches == 1


def test_auto_in_the_second_epoch_only():
    """What was trained before stays as it was."""
    at_epoch = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: Hungry.feed([None, 2][epoch])
    )
    callback = cut("auto")
    sizes = []
    tell = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: sizes.append(callback.micro_batch_size)
    )
    model = hungry_model(layers=stateful())
    auto = fit(model, callback, callbacks=[at_epoch, tell])
    assert sizes == [10, 2]
    Hungry.feed(None)
    twin = hungry_model(layers=stateful())
    first = fit(twin, cut(10), epochs=1).history
    second = fit(twin, cut(2), epochs=2, initial_epoch=1)
    second.history = {k: first[k] + second.history[k] for k in first}
    same(auto, second)


def test_an_attempt_that_fails_forgets_no_gradients():
    """`log_gradients`: what an epoch's earlier updates measured is kept."""
    feed = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batch == 2 and Hungry.feed(2)
    )
    norms = []
    for size, callbacks in ((8, []), ("auto", [feed])):
        model = hungry_model()
        model.compile(
            keras.optimizers.SGD(0.0), model.loss, **compile_options()
        )
        callback = GradientAccumulationCallback(
            micro_batch_size=size, log_gradients=True
        )
        log = fit(model, callback, 8, epochs=1, callbacks=callbacks).history
        norms.append(log["gradient_norm"][0])
    assert callback.micro_batch_size == 2 and Hungry.failed
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


def runner_class():
    """What runs the steps of this backend."""
    names = {"tensorflow": "TensorFlow", "jax": "Jax", "torch": "Torch"}
    module = importlib.import_module(f"kaccum.backends.{BACKEND}.runner")
    return getattr(module, f"{names[BACKEND]}Runner")


def test_auto_under_xla(monkeypatch):
    """Where the third micro-batch fails, two others are taken back."""
    runner = runner_class()
    real = runner.run_parts

    def short_of_memory(self, batch, sizes):
        if sizes[0][0] <= 2:
            return real(self, batch, sizes)
        # XLA runs no function that could fail inside.
        parts = backend().cut(batch, sizes, self.model)
        whole = [next(parts) for _ in range(min(2, len(sizes) - 1))]
        if whole:
            self.run(iter(whole), [False] * len(whole), is_plain=False)
        raise out_of_memory()

    def model():
        keras.utils.set_random_seed(0)
        stack = [keras.Input((FEATURES,)), *stateful(), keras.layers.Dense(3)]
        model = keras.Sequential(stack)
        loss = "sparse_categorical_crossentropy"
        model.compile("adam", loss, **compile_options("xla"))
        return model

    monkeypatch.setattr(runner, "run_parts", short_of_memory)
    callback = cut("auto")
    auto = fit(model(), callback, 12)
    assert callback.micro_batch_size == 2
    monkeypatch.setattr(runner, "run_parts", real)
    same(auto, fit(model(), cut(2), 12))


class TestEveryLimit:
    """One model for all examples: tracing takes longer than training."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        model = hungry_model()
        model.optimizer.build(model.trainable_variables)
        return model, values_of(model)

    @drawn(5 if BACKEND == "jax" else 15)
    @hypothesis.given(
        limit=st.integers(1, EXAMPLES),
        batch_size=st.integers(1, EXAMPLES),
        fails_in=st.sampled_from(["forward", "backward"]),
        patience=st.integers(0, 3),
    )
    def test_auto_is_the_large_batch(
        self, model, limit, batch_size, fails_in, patience
    ):
        """For every limit: as its outcome from the start, as without a cut."""
        model, start = model

        def run(*callbacks):
            set_values(model, start)
            history = model.fit(
                X, Y, batch_size, verbose=0, shuffle=False, callbacks=callbacks
            ).history
            return result_of(model, history)

        Hungry.feed(limit, fails_in, patience)
        callback = cut("auto")
        auto = run(callback)
        found = callback.micro_batch_size
        assert patience or found <= limit
        Hungry.feed(None)
        problem = Problem(steps=-(-batch_size // found))
        for other in ([cut(found)], []):
            assert_same(problem, auto, run(*other))


def test_the_size_is_remembered(capsys):
    """For this fit and the next; told once; not for another model."""
    Hungry.feed(3)
    callback = cut("auto")
    assert callback.micro_batch_size == "auto"
    model = hungry_model()
    fit(model, callback, verbose=2)
    assert Hungry.seen[:3] == [10, 5, 3]
    assert max(Hungry.seen[3:]) == 3
    told = [
        "kaccum: 10 examples an update, in the largest micro-batches that fit "
        "in memory; 5 updates an epoch, the last of 5 examples.",
        "kaccum: no memory for 10 examples; trying micro-batches of 5.",
        "kaccum: no memory for 5 examples; trying micro-batches of 3.",
        "kaccum: micro-batches of 3 examples fit in memory.",
    ]
    assert ours_in(capsys) == told
    assert repr(callback).endswith("(micro_batch_size='auto')")
    Hungry.feed(3)
    fit(model, callback, batch_size=25, verbose=2)
    assert max(Hungry.seen) == 3
    assert ours_in(capsys) == [
        "kaccum: 25 examples an update = 9 micro-batches of 3 at most; 2 "
        "updates an epoch, the last of 20 examples."
    ]
    Hungry.feed(3)
    fit(hungry_model(), callback)
    assert ours_in(capsys) == []
    Hungry.feed(None)
    fit(hungry_model(), callback)
    assert Hungry.seen[0] == callback.micro_batch_size == 10


@pytest.mark.parametrize("execution", WAYS)
def test_a_single_example_that_does_not_fit(execution):
    """The original error and a sentence; the state is that of before."""
    Hungry.feed(0)
    model = hungry_model(execution, stateful())
    before = [v.numpy() for v in model.variables]
    with pytest.raises(
        type(out_of_memory()),
        match=r"(?s)no more memory.*\nA single example does not fit in memory, "
        r"so that no smaller micro-batch is left to try\.$",
    ):
        fit(model, cut("auto"))
    assert attempts(Hungry.seen) == [10, 5, 3, 2, 1]
    assert Session.of(model)._runner._before is None
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
    Hungry.feed(None)
    same(
        fit(model, cut(4)),
        fit(hungry_model(execution, stateful()), cut(4)),
    )


def test_only_memory_is_tried_again():
    """Another error is the user's, also while one of memory is handled."""

    class Wrong(Watched):
        def see(self, array):
            raise ZeroDivisionError("mine")

    model = hungry_model("eager", [Wrong()])
    with pytest.raises(error_in_a_step(ZeroDivisionError), match="mine"):
        try:
            raise MemoryError
        except MemoryError:
            fit(model, cut("auto"))
    assert Hungry.seen == [10]


def test_data_that_does_not_fit_is_not_tried_again():
    """Smaller micro-batches would not help."""
    begun = []

    def batches():
        begun.append(True)
        if len(begun) > 1:
            # (Keras looks at the first batch before it trains.)
            raise MemoryError("no more memory")
        yield X, Y

    callback = cut("auto")
    error = error_in_the_data(MemoryError)
    source = of_unknown_length(batches)
    with pytest.raises(error, match="no more memory"):
        hungry_model().fit(source, verbose=0, callbacks=[callback])
    assert Hungry.seen == [] and callback.micro_batch_size == "auto"


def as_text():
    """As the framework may say it, too."""
    if BACKEND == "tensorflow":
        text = "RESOURCE_EXHAUSTED: Out of memory while trying"
        return tf.errors.InternalError(None, None, text)
    if BACKEND == "torch":
        text = "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't"
        return RuntimeError(text)
    return MemoryError("no more")


@pytest.mark.parametrize("origin", [out_of_memory, as_text, MemoryError])
@pytest.mark.parametrize("how", ["bare", "cause", "context"])
def test_memory_that_ran_out_is_recognised(origin, how):
    """Whatever it is wrapped in."""
    origin = error = origin()
    if how != "bare":
        error = RuntimeError("wrapped")
        setattr(error, f"__{how}__", origin)
    assert micro_batches.out_of_memory(error, None) is origin
    assert micro_batches.out_of_memory(error, origin) is None
    assert micro_batches.out_of_memory(RuntimeError("wrapped"), None) is None
    again = backend().out_of_memory(origin, "And this.")
    assert isinstance(again, type(out_of_memory()))
    assert re.search(r"\nAnd this\.$", getattr(again, "message", str(again)))


def test_steps_first_then_auto():
    """What `steps` compiled is used again, its state taken back as well."""
    twin, model = (hungry_model(layers=stateful()) for _ in range(2))
    callback = cut("auto")
    for each, second in ((twin, cut(3)), (model, callback)):
        Hungry.feed(None)
        first = GradientAccumulationCallback(2)
        each.fit(X, Y, 5, verbose=0, shuffle=False, callbacks=[first])
        Hungry.feed(None if each is twin else 3)
        fit(each, second)
    assert callback.micro_batch_size == 3
    same(result_of(model, {"loss": [1.0]}), result_of(twin, {"loss": [1.0]}))
