"""What a fit says beforehand, and of mistakes that train something else."""

import copy
import gc
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras.optimizers import schedules

from kaccum import GradientAccumulationCallback, accumulate
from kaccum.fit.plan import Data, advice, line_of_size, line_of_steps
from tests.backends import compile_options, needs_graphs, only_on, own_step, tf

X, Y = np.ones((229, 4), "float32"), np.ones((229, 1), "float32")
OWN = (
    " The model's own `train_step` runs for each micro-batch, with all that it "
    "does beside the update."
)


def small(kind=keras.Model, optimizer="sgd"):
    x = keras.Input((4,))
    model = kind(x, keras.layers.Dense(1)(x))
    model.compile(optimizer, "mse", **compile_options("eager"))
    return model


def lines(capsys):
    printed = capsys.readouterr().out.splitlines()
    return [line for line in printed if line.startswith("kaccum")]


def ours_of(told):
    """PyTorch's arrays have warnings of NumPy beside."""
    return [warning for warning in told if warning.category is UserWarning]


def squared(y, y_pred):
    return keras.ops.mean(keras.ops.square(y - y_pred))


class Own(keras.Model):
    train_step = own_step(squared)


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            line_of_steps(8, Data(232, 8, 5)),
            "64 examples an update = 8 micro-batches of 8; 29 updates an "
            "epoch, the last of 61 examples.",
        ),
        (
            line_of_steps(4, Data(5, 8, 8)),
            "32 examples an update = 4 micro-batches of 8; 2 updates an epoch, "
            "the last of 8 examples.",
        ),
        (
            line_of_steps(4, Data(8, 8, 8)),
            "32 examples an update = 4 micro-batches of 8; 2 updates an epoch.",
        ),
        (
            line_of_steps(4, Data(1, 8, 1)),
            "32 examples an update = 4 micro-batches of 8; 1 update an epoch, "
            "of 1 example.",
        ),
        (
            line_of_steps(1, Data(3, 8, 8)),
            "8 examples an update = 1 micro-batch of 8; 3 updates an epoch.",
        ),
        (
            line_of_steps(4, Data(6)),
            "4 micro-batches an update; 2 updates an epoch, the last of 2 "
            "micro-batches.",
        ),
        (line_of_steps(4, Data()), "4 micro-batches an update."),
        (
            line_of_size(8, Data(29, 64, 5)),
            "64 examples an update = 8 micro-batches of 8; 29 updates an "
            "epoch, the last of 5 examples.",
        ),
        (
            line_of_size(9, Data(29, 64, 64)),
            "64 examples an update = 8 micro-batches of 8; 29 updates an "
            "epoch.",
        ),
        (
            line_of_size(10, Data(None, 64)),
            "64 examples an update = 7 micro-batches of 10 at most.",
        ),
        (
            line_of_size("auto", Data(29, 64, 64)),
            "64 examples an update, in the largest micro-batches that fit in "
            "memory; 29 updates an epoch.",
        ),
        (
            line_of_steps(4, Data(8, 16, 16, devices=2)),
            "64 examples an update = 4 micro-batches of 16, shared by 2 "
            "devices, 8 on each; 2 updates an epoch.",
        ),
        (
            line_of_steps(4, Data(8, 15, 15, devices=2)),
            "60 examples an update = 4 micro-batches of 15, shared by 2 "
            "devices, 8 on each at most; 2 updates an epoch.",
        ),
        (
            line_of_steps(4, Data(devices=2)),
            "4 micro-batches an update, shared by 2 devices.",
        ),
        (
            line_of_size(8, Data(2, 64, 64, devices=2)),
            "64 examples an update = 4 micro-batches of 8 on each of 2 "
            "devices; 2 updates an epoch.",
        ),
        (
            line_of_size(8, Data(2, 63, 63, devices=2)),
            "63 examples an update = 4 micro-batches of 8 at most on each of 2 "
            "devices; 2 updates an epoch.",
        ),
        (
            line_of_size("auto", Data(2, 64, 64, devices=2)),
            "64 examples an update, in the largest micro-batches that fit in "
            "memory on each of 2 devices; 2 updates an epoch.",
        ),
        (
            line_of_size(8, Data()),
            "the batch an update = micro-batches of 8 at most.",
        ),
    ],
)
def test_a_line_says_how_examples_are_cut(line, expected):
    """Whole sentences, in numbers that users know."""
    assert line == f"kaccum: {expected}"


def test_fit_says_so_once(capsys):
    """On the screen, as `fit` does; again where an epoch has other steps."""
    callback = GradientAccumulationCallback({0: 4, 2: 8})
    small().fit(X, Y, batch_size=8, epochs=3, verbose=2, callbacks=[callback])
    assert lines(capsys) == [
        "kaccum: 32 examples an update = 4 micro-batches of 8; 8 updates an "
        "epoch, the last of 5 examples.",
        "kaccum: 64 examples an update = 8 micro-batches of 8; 4 updates an "
        "epoch, the last of 37 examples.",
    ]
    assert callback.updates == 8 + 8 + 4


def test_a_silent_fit_says_nothing(capsys):
    """`verbose=0` is for that."""
    callback = GradientAccumulationCallback(4)
    small().fit(X, Y, batch_size=8, verbose=0, callbacks=[callback])
    assert lines(capsys) == []


def test_a_step_of_the_models_own_is_told(capsys):
    """It clips, draws and counts once a micro-batch."""
    callback = GradientAccumulationCallback(micro_batch_size=4)
    small(Own).fit(X, Y, batch_size=8, verbose=2, callbacks=[callback])
    assert lines(capsys) == [
        "kaccum: 8 examples an update = 2 micro-batches of 4; 29 updates an "
        "epoch, the last of 5 examples." + OWN
    ]


@needs_graphs
def test_a_data_set_does_not_tell_its_batches(capsys):
    """Only how many there are, if that."""
    data = tf.data.Dataset.from_tensor_slices((X[:12], Y[:12])).batch(4)
    callback = GradientAccumulationCallback(2)
    small().fit(data, verbose=2, callbacks=[callback])
    assert lines(capsys) == [
        "kaccum: 2 micro-batches an update; 2 updates an epoch, the last of 1 "
        "micro-batch."
    ]


@pytest.mark.parametrize("steps", [1, 4])
def test_updates_are_counted(steps):
    """Also where that is a plain fit."""
    callback = GradientAccumulationCallback(steps)
    model = small()
    for _ in range(2):
        model.fit(X[:16], Y[:16], batch_size=2, verbose=0, callbacks=[callback])
        assert callback.updates == 8 // steps


@pytest.mark.parametrize(
    "arguments",
    [
        "steps=4",
        "steps={0: 1, 5: 4}",
        "micro_batch_size=8",
        "micro_batch_size='auto', skip_nonfinite=True",
        "steps=4, weight='sum'",
    ],
)
def test_a_callback_says_its_arguments(arguments):
    """In the order of its signature."""
    text = f"GradientAccumulationCallback({arguments})"
    assert repr(eval(text)) == text


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, "pickle"])
@pytest.mark.parametrize("arguments", [{"steps": 2}, {"micro_batch_size": 4}])
def test_a_callback_is_copied(copied, arguments):
    """Before a fit and after; the copy trains as the first does."""
    if copied == "pickle":

        def copied(callback):
            return pickle.loads(pickle.dumps(callback))

    callback = copied(GradientAccumulationCallback(**arguments))
    model = small()
    model.fit(X[:16], Y[:16], batch_size=8, verbose=0, callbacks=[callback])
    again = copied(callback)
    assert again.updates == callback.updates > 0
    assert repr(again) == repr(callback)
    small().fit(X[:16], Y[:16], batch_size=8, verbose=0, callbacks=[again])
    assert again.updates == callback.updates


def fit_with(steps, batch_size, optimizer="sgd", epochs=1):
    callback = GradientAccumulationCallback(steps)
    small(optimizer=optimizer).fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=[callback],
    )


def test_steps_longer_than_an_epoch_are_told():
    """Each epoch is one short window."""
    with pytest.warns(
        UserWarning,
        match="`steps` must not be more than the batches of an epoch, or an "
        "epoch is one short window. Received: steps=8, and 4 batches an epoch.",
    ) as told:
        fit_with(8, 64, epochs=2)
    assert len(ours_of(told)) == 1


def test_a_batch_size_that_is_meant_for_an_update_is_told():
    """The batches of `fit` are micro-batches."""
    with pytest.warns(
        UserWarning,
        match="`batch_size` must be that of a micro-batch where `steps` is "
        "given. Received: batch_size=64 and steps=4, which make 1 update an "
        "epoch. If 64 examples are meant to make an update, write "
        "`batch_size=16`, or `micro_batch_size` instead of `steps`.",
    ):
        fit_with(4, 64)


def test_a_micro_batch_as_large_as_the_batch_is_told():
    """Nothing is cut."""
    callback = GradientAccumulationCallback(micro_batch_size=32)
    with pytest.warns(
        UserWarning,
        match="`micro_batch_size` must be less than the examples of a batch "
        "for anything to be cut. Received: micro_batch_size=32, and a batch of "
        "32 examples.",
    ) as told:
        small().fit(X, Y, batch_size=32, verbose=0, callbacks=[callback])
    assert len(ours_of(told)) == 1


def test_accumulate_that_is_never_entered_is_told():
    """It does nothing by itself."""
    with pytest.warns(
        UserWarning,
        match="`accumulate` must be entered for gradients to be accumulated. "
        "Received: a call without `with`.",
    ):
        accumulate(small(), 4)
        gc.collect()


def test_accumulate_decorates_a_function():
    """As other contexts do; it is entered at each call."""
    model = small()

    @accumulate(model, 2)
    def train():
        for _ in range(2):
            model.train_on_batch(X[:4], Y[:4])

    train()
    train()
    assert int(model.optimizer.iterations) == 2


SCHEDULES = {
    "decay_steps": schedules.CosineDecay(0.1, 58),
    "first_decay_steps": schedules.CosineDecayRestarts(0.1, 50),
    "boundaries": schedules.PiecewiseConstantDecay([20, 40], [0.1, 0.2, 0.3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_counts_micro_batches_is_told(name):
    """It would never come to its end: 16 updates, of 58 batches."""
    optimizer = keras.optimizers.SGD(SCHEDULES[name])
    with pytest.warns(
        UserWarning,
        match="A schedule of the learning rate must count updates, of which a "
        f"window of micro-batches makes one. Received: `{name}` up to .*, and "
        "16 updates in this `fit`. A schedule that is for this `fit` alone "
        "must end at 16.",
    ):
        fit_with(4, 8, optimizer, epochs=2)


def test_a_schedule_of_several_fits_is_not_told(recwarn):
    """A second one goes on where the first one ended."""
    optimizer = keras.optimizers.SGD(schedules.CosineDecay(0.1, 58))
    model = small(optimizer=optimizer)
    model.fit(X, Y, batch_size=64, epochs=8, verbose=0)
    callback = GradientAccumulationCallback(4)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    assert not [w for w in recwarn if "A schedule" in str(w.message)]


@pytest.mark.parametrize(
    "steps, batch_size, schedule",
    [
        (4, 8, schedules.CosineDecay(0.1, 16)),
        (4, 8, schedules.CosineDecay(0.1, 10_000)),
        (4, 8, schedules.ExponentialDecay(0.1, 58, 0.9)),
        (4, 8, 0.1),
        (1, 64, schedules.CosineDecay(0.1, 4)),
        (2, 64, 0.1),
    ],
)
def test_what_is_meant_is_not_told(steps, batch_size, schedule, recwarn):
    """No false alarms."""
    fit_with(steps, batch_size, keras.optimizers.SGD(schedule), epochs=2)
    kinds = ("`steps` must", "A schedule", "`micro_batch_size` must")
    assert not [w for w in recwarn if str(w.message).startswith(kinds)]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            (2, None, Data(8, 64)),
            "micro-batches of 64 examples did not fit in memory. Write "
            "`batch_size=32` and `steps=4`; or `batch_size=128` and "
            '`micro_batch_size="auto"` finds what fits.',
        ),
        (
            (2, None, Data()),
            "a micro-batch did not fit in memory. Halve the batches of the "
            "data, and write `steps=4`.",
        ),
        (
            (1, 8, Data(8, 64)),
            "micro-batches of 8 examples did not fit in memory. Write "
            '`micro_batch_size=4`; `micro_batch_size="auto"` finds what fits.',
        ),
    ],
)
def test_advice_names_the_line_to_write(arguments, expected):
    """With half as many examples at once."""
    assert advice(*arguments) == f"kaccum: {expected}"


PROGRAM = """
import os, resource, keras, numpy as np
from kaccum import GradientAccumulationCallback

layers = [keras.layers.Dense(4096, "relu") for _ in range(2)]
stack = [keras.Input((4096,)), *layers, keras.layers.Dense(1)]
model = keras.Sequential(stack)
model.compile("sgd", "mse")
x, y = np.ones((32768, 4096), "float32"), np.ones((32768, 1), "float32")
model.fit(x[:8], y[:8], batch_size=4, verbose=0)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + 700 * 2**20
before = model.get_weights()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
callback = GradientAccumulationCallback(2)
try:
    model.fit(x, y, batch_size=16384, verbose=0, callbacks=[callback])
finally:
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print([(a == b).all() for a, b in zip(before, model.get_weights())])
    model.fit(x[:8], y[:8], batch_size=4, verbose=0, callbacks=[callback])
"""


@only_on("jax", "torch", reason="it aborts where the processor's memory ends")
@pytest.mark.skipif(sys.platform != "linux", reason="no limit to set")
def test_memory_that_runs_out_is_told_with_advice():
    """Memory that really does, in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1
    # The weights are what they were, and can be trained.
    assert ran.stdout.split() and "False" not in ran.stdout
    assert ran.stderr.rstrip().endswith(
        "kaccum: micro-batches of 16384 examples did not fit in memory. Write "
        "`batch_size=8192` and `steps=4`; or `batch_size=32768` and "
        '`micro_batch_size="auto"` finds what fits.'
    )
