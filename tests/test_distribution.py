"""Laws 1 and 2 on several devices: `keras.distribution`, on JAX."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from kaccum import GradientAccumulationCallback
from kaccum.fit.session import Session
from tests.backends import only_on
from tests.pages import examples_of
from tests.profiles import drawn
from tests.reference import (
    Problem,
    assert_same,
    build_model,
    data,
    fit_large,
    fit_micro,
    result_of,
)
from tests.strategies import KINDS

pytestmark = only_on("jax", reason="`keras.distribution` is of JAX")


def data_parallel(devices):
    """A distribution over so many parts of the processor, or GPUs."""
    from kaccum.backends.jax import device_names

    return keras.distribution.DataParallel(devices=device_names(devices))


def model_parallel():
    """Two groups of devices for the data, two parts of each kernel."""
    from kaccum.backends.jax import device_names

    mesh = keras.distribution.DeviceMesh(
        (2, 2), ["batch", "model"], device_names(4)
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*embeddings"] = (None, "model")
    layouts[".*dense/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )


@drawn(8)
@hypothesis.given(
    devices=st.sampled_from([2, 4]),
    batches=st.integers(1, 7),
    last=st.integers(1, 2),
    steps=st.integers(2, 4),
    cut=st.booleans(),
    kind=st.sampled_from(KINDS),
    options=st.sampled_from([(), (("global_clipnorm", 0.05),)]),
    steps_per_execution=st.sampled_from([1, 3]),
)
def test_devices_train_as_one(devices, batches, last, **fields):
    """Whatever the loss; the last batch is a short one."""
    # (Keras needs batches that the devices divide.)
    problem = Problem(
        examples=devices * (2 * (batches - 1) + last),
        micro_batch=2 * devices,
        optimizer="SGD",
        execution="xla",
        **fields,
    )
    with data_parallel(devices).scope():
        micro = fit_micro(problem, build_model(problem))
    assert_same(problem, micro, fit_large(problem))


class Watches(keras.callbacks.Callback):
    """Looks where weights and their sums are, inside of a window."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        session = Session.installed_on(self.model)
        (accumulator,) = session._step.sums.gradients
        for variable in self.model.trainable_variables:
            total = accumulator._entries[id(variable)].total
            arrays = variable.value, total.value
            parts = [a.sharding.shard_shape(a.shape) for a in arrays]
            self.seen.append((tuple(variable.shape), *parts))


@pytest.mark.parametrize("execution", ["xla", "eager"])
@pytest.mark.parametrize("cut", [False, True], ids=["steps", "cut"])
@pytest.mark.parametrize("kind", ["mean", "mask"])
def test_weights_in_parts_train_as_whole_ones(kind, cut, execution):
    """`ModelParallel`: the sums are where their weights are."""
    fields = {"examples": 22, "kind": kind, "cut": cut, "execution": execution}
    problem = Problem(options=(("epsilon", 1e-3),), **fields)
    # Layers are named anew.
    keras.backend.clear_session()
    watches = Watches()
    with model_parallel().scope():
        callbacks = [problem.callback, watches]
        micro = fit_micro(problem, build_model(problem), callbacks)
    assert_same(problem, micro, fit_large(problem))
    assert all(weight == total for _, weight, total in watches.seen)
    in_parts = {shape for shape, part, _ in watches.seen if shape != part}
    assert len(in_parts) == (2 if kind == "mask" else 1)


@pytest.mark.parametrize("is_in_parts", [False, True])
def test_devices_measure_the_gradients_of_one(is_in_parts):
    """`log_gradients`: a micro-batch of all devices is one."""
    problem = Problem(examples=32, optimizer="SGD", execution="xla")
    keras.backend.clear_session()
    logs = []
    for parallel in (
        model_parallel() if is_in_parts else data_parallel(2),
        None,
    ):
        callback = GradientAccumulationCallback(3, log_gradients=True)
        with parallel.scope() if parallel else contextlib.nullcontext():
            model = build_model(problem)
            logs.append(fit_micro(problem, model, [callback]).history)
    assert np.isfinite(logs[1]["noise_scale"]).all()
    for name, values in logs[1].items():
        np.testing.assert_allclose(logs[0][name], values, rtol=1e-3)


PROGRAM = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
index, folder = int(sys.argv[1]), sys.argv[2]
{start}
from tests import test_distribution as tests
tests.train(tests.PROBLEM, index, folder)
"""
PROBLEM = Problem(examples=20, micro_batch=4, optimizer="SGD", execution="xla")


def train(problem, process, folder):
    """What one of two processes does: it has half of each batch."""
    x, y, _ = data(problem)
    model = build_model(problem)
    history = model.fit(
        x[process::2],
        y[process::2],
        batch_size=problem.batch // 2,
        epochs=problem.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[problem.callback],
    ).history
    # All processes must save: Keras has them meet in it.
    model.save(f"{folder}/{process}.keras")
    np.savez(f"{folder}/{process}.npz", **history)


def test_two_processes_train_as_one(tmp_path):
    """As the page says for two machines, over the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (start,) = [
        example
        for mark, example in examples_of("devices")
        if mark == "on two machines"
    ]
    assert "10.0.0.1:1234" in start
    start = textwrap.dedent(start).replace("10.0.0.1:1234", address)
    program = PROGRAM.format(start=start)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # NCCL wants a GPU for each.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for index in (0, 1)
    ]
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    large = fit_large(PROBLEM)
    for process in (0, 1):
        model = keras.saving.load_model(tmp_path / f"{process}.keras")
        loaded = np.load(tmp_path / f"{process}.npz")
        history = {name: loaded[name].tolist() for name in loaded.files}
        assert_same(PROBLEM, result_of(model, history), large)
