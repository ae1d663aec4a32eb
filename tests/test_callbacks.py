"""Laws 4 and 6 beside Keras's own callbacks, before and after ours."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import callbacks

from kaccum import GradientAccumulationCallback
from tests import profiles, reference
from tests.backends import needs_tensorboard
from tests.recorders import Stop
from tests.reference import MODELS, ORACLES, Problem, build_model, data

# Windows of 3 and of 2 micro-batches, each epoch.
PROBLEM = Problem(examples=18, micro_batch=4, steps=3, epochs=4)
ORDERS = pytest.mark.parametrize(
    "is_first", [True, False], ids=["before", "after"]
)


def in_order(theirs, is_first, steps=PROBLEM.steps):
    both = [theirs, GradientAccumulationCallback(steps)]
    return both[:: 1 if is_first else -1]


def fit(model, batch_size, called, inputs=None, **options):
    x, y, _ = data(PROBLEM)
    options = {"epochs": PROBLEM.epochs, "shuffle": False, **options}
    return model.fit(
        x if inputs is None else inputs,
        y,
        batch_size,
        verbose=0,
        callbacks=called,
        **options,
    ).history


def built(problem=PROBLEM):
    """A new model, and its optimizer, whose state a file may hold."""
    model = build_model(problem)
    model.optimizer.build(model.trainable_variables)
    return model


@contextlib.contextmanager
def lent(problem=PROBLEM):
    """A model that may have been compiled by another test, as if new."""
    models = ORACLES if problem == problem.truth else MODELS
    with models.lent(problem) as model:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        yield model


def trained(make, is_first, problem=PROBLEM, **options):
    """The results in micro-batches and in large batches."""
    results = []
    for each, batch_size, called in (
        (problem, 4, in_order(make("micro"), is_first)),
        (problem.truth, 12, [make("large")]),
    ):
        with lent(each) as model:
            history = fit(model, batch_size, called, **options)
            results.append(reference.result_of(model, history))
    return results


@ORDERS
@pytest.mark.parametrize(
    "name, options, epochs",
    [
        # Each takes a loss that falls for one that gets worse.
        (
            "EarlyStopping",
            {
                "monitor": "loss",
                "mode": "max",
                "patience": 1,
                "restore_best_weights": True,
            },
            2,
        ),
        (
            "ReduceLROnPlateau",
            {"monitor": "loss", "mode": "max", "patience": 1, "factor": 0.5},
            4,
        ),
        (
            "LearningRateScheduler",
            {"schedule": lambda epoch, rate: rate * 0.5},
            4,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_callbacks_act_as_beside_large_batches(name, options, epochs, is_first):
    """Law 4: what they do at an epoch's end finds the short window applied."""

    def make(_):
        return getattr(callbacks, name)(**options)

    micro, large = trained(make, is_first)
    assert len(large.history["loss"]) == epochs
    assert not large.history["loss"][0] < large.history["loss"][-1]
    reference.assert_same(PROBLEM, micro, large)


@ORDERS
@pytest.mark.parametrize("swap_on_epoch", [True, False])
def test_averages_are_swapped_as_beside_large_batches(swap_on_epoch, is_first):
    """Law 3: `SwapEMAWeights` validates with averages over updates."""
    options = (("use_ema", True), ("ema_momentum", 0.5))
    problem = dataclasses.replace(PROBLEM, options=options)
    micro, large = trained(
        lambda _: callbacks.SwapEMAWeights(swap_on_epoch),
        is_first,
        problem,
        validation_data=data(problem)[:2],
        validation_batch_size=18,
    )
    reference.assert_same(problem, micro, large)


@ORDERS
def test_a_csv_log_is_that_of_large_batches(is_first, tmp_path):
    """Law 1: the same columns, the same rows."""
    trained(
        lambda name: callbacks.CSVLogger(tmp_path / f"{name}.csv"),
        is_first,
        validation_data=data(PROBLEM)[:2],
        validation_batch_size=18,
    )
    tables = []
    for name in ("micro", "large"):
        with open(tmp_path / f"{name}.csv", newline="") as file:
            tables.append(list(csv.reader(file)))
    assert tables[0][0] == tables[1][0]
    micro, large = (np.array(table[1:], float) for table in tables)
    assert large.shape == (4, 7)
    np.testing.assert_allclose(micro, large, rtol=1e-5)


@needs_tensorboard
@ORDERS
def test_a_tensorboard_is_that_of_large_batches(is_first, tmp_path):
    """Law 1: the same scalars at the same epochs."""
    trained(
        lambda name: callbacks.TensorBoard(tmp_path / name),
        is_first,
    )
    micro, large = (_scalars(tmp_path / name) for name in ("micro", "large"))
    assert ("epoch_loss", 3) in large
    assert micro.keys() == large.keys()
    for key, value in large.items():
        np.testing.assert_allclose(micro[key], value, rtol=1e-5)


def _scalars(folder):
    """The last scalar of each tag and step."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    found = {}
    for file in folder.rglob("events*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["tensors"]:
            if tag.startswith("epoch_"):
                for event in events.Tensors(tag):
                    number = tensor_util.make_ndarray(event.tensor_proto)
                    found[tag, event.step] = float(number)
    return found


@ORDERS
@pytest.mark.parametrize("row", [5, 13], ids=["middle", "short"])
def test_a_nan_terminates_as_in_a_large_batch(row, is_first):
    """Law 4: at the same update, with the NaN in the weights as there."""
    inputs = np.array(data(PROBLEM)[0])
    inputs[row, 0] = np.nan
    micro, large = trained(
        lambda _: callbacks.TerminateOnNaN(), is_first, inputs=inputs
    )
    assert micro.iterations == large.iterations == 1 + row // 12
    assert len(micro.history["loss"]) == len(large.history["loss"]) == 1
    for mine, other in zip(micro.weights, large.weights, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    assert any(np.isnan(weights).all() for weights in micro.weights)


class _Remembers(callbacks.Callback):
    """Keeps weights and optimizer state after each large batch."""

    def on_train_begin(self, logs=None):
        self.states = []
        self.keep()

    def on_train_batch_end(self, batch, logs=None):
        self.keep()

    def keep(self):
        self.states.append(reference.result_of(self.model, {"none": [0.0]}))


@functools.cache
def remembered():
    """What large batches come to, one by one."""
    remembers = _Remembers()
    with lent(PROBLEM.truth) as model:
        fit(model, 12, [remembers], epochs=2)
    return remembers.states


@ORDERS
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("save_freq", [2, 3, "epoch"])
def test_a_checkpoint_is_that_of_the_updates_so_far(
    save_freq, weights_only, is_first, tmp_path
):
    """Law 6: in the middle of a window, at its end, and at an epoch's."""
    name = "{epoch}" if save_freq == "epoch" else "{epoch}-{batch}"
    ending = ".weights.h5" if weights_only else ".keras"
    saves = callbacks.ModelCheckpoint(
        tmp_path / f"{name}{ending}",
        save_freq=save_freq,
        save_weights_only=weights_only,
    )
    with lent() as model:
        fit(model, 4, in_order(saves, is_first), epochs=2)
    files = sorted(tmp_path.iterdir())
    assert len(files) == {2: 5, 3: 3, "epoch": 2}[save_freq]
    for file in files:
        epoch, *batch = map(int, file.name.removesuffix(ending).split("-"))
        updates = 2 * epoch
        if batch:
            # Micro-batches of this epoch: 3 are a window, the fifth its last,
            # whose short window is applied after the batch's hooks.
            updates += batch[0] // 3 - 2
        if weights_only:
            model = built()
            model.load_weights(file)
        else:
            model = keras.saving.load_model(file)
        saved = reference.result_of(model, {"none": [0.0]})
        reference.assert_same(PROBLEM, saved, remembered()[updates])


# (`save_freq`, whether it stands before ours) of each run that is killed in its
# ninth micro-batch: the first of the second window of the second epoch.
KILLED = [("epoch", True), (3, False)]
if profiles.is_nightly():
    KILLED += [("epoch", False), (3, True)]


class _Kills(callbacks.Callback):
    """Kills the process in the middle of a window and of an epoch."""

    epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)


def fit_until_killed(folder, save_freq, is_first):
    """What the processes run that are killed."""
    backup = callbacks.BackupAndRestore(folder, save_freq)
    fit(built(), 4, [*in_order(backup, is_first), _Kills()])


@pytest.fixture(scope="module")
def backups(tmp_path_factory):
    """The backups of all killed processes, which ran side by side."""
    folders, processes = {}, []
    for case in KILLED:
        folders[case] = tmp_path_factory.mktemp("backup")
        arguments = json.dumps([str(folders[case]), *case])
        program = (
            "import json; from tests.test_callbacks import fit_until_killed; "
            f"fit_until_killed(*json.loads({arguments!r}))"
        )
        processes.append(subprocess.Popen([sys.executable, "-c", program]))
    for process in processes:
        assert process.wait() == -signal.SIGKILL
    return folders


@pytest.mark.parametrize(
    "save_freq, is_first",
    KILLED,
    ids=[f"{freq}-{'before' if first else 'after'}" for freq, first in KILLED],
)
def test_a_killed_run_is_resumed(save_freq, is_first, backups):
    """Law 6: `BackupAndRestore` goes on as in a run with large batches."""
    backup = callbacks.BackupAndRestore(
        backups[save_freq, is_first], save_freq
    )
    model, twin = built(), built(PROBLEM.truth)
    micro = fit(model, 4, in_order(backup, is_first))
    if save_freq == "epoch":
        # The epoch that was killed starts again: as if it never had been.
        large = fit(twin, 12, [])
        large = {name: values[1:] for name, values in large.items()}
    else:
        # Keras goes back to the start of the epoch, with the weights of the
        # last backup: of the ninth micro-batch, after three updates.
        with pytest.raises(KeyboardInterrupt):
            fit(twin, 12, [Stop(error=KeyboardInterrupt, updates=3)])
        large = fit(twin, 12, [], initial_epoch=1)
    reference.assert_same(
        PROBLEM,
        reference.result_of(model, micro),
        reference.result_of(twin, large),
    )
