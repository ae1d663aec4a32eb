"""Processes of PyTorch train as one, on the loopback address."""

import functools
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from kaccum import GradientAccumulationCallback, GradientAccumulator
from tests import processes
from tests.backends import BACKEND, IS_NEW, only_on
from tests.pages import ROOT, examples_of

only_on_torch = only_on("torch", reason="`torch.distributed`")
needs_wrapping = pytest.mark.skipif(not IS_NEW, reason="Keras does not wrap")

STEPS = {"steps": 4, "size": 8}
CASES = {
    "weights": STEPS,
    "clipping": {**STEPS, "clipnorm": 0.05},
    "a sum": {**STEPS, "reduction": "sum"},
    "unequal": {**STEPS, "first": 1},
    "nothing in the last batch": {**STEPS, "examples": 81},
    "cut": {**STEPS, "cut": 3},
    "cut, unequal": {**STEPS, "cut": 3, "first": 2},
    "scaled": {**STEPS, "scales": True},
    "cut, unequal, scaled": {**STEPS, "cut": 3, "first": 2, "scales": True},
    "auto": {**STEPS, "cut": "auto", "limit": 3},
    "a NaN": {
        **STEPS,
        "skips": [0, 1, 2, 3],
        "reduction": "sum_over_batch_size",
    },
    # One of three processes has five micro-batches, one two.
    "fewer micro-batches": {
        "steps": 2,
        "size": 1,
        "lists": [
            [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
            [[10, 11, 12], [13]],
            [[20, 21], [22], [23, 24, 25]],
        ],
    },
}


IS_POSITIVE = processes.numbers()[0][:, 0] > 0
# In one of the processes a weight has no gradient.
CASES["a branch"] = {
    "steps": 2,
    "size": 1,
    "branches": True,
    "lists": [
        np.flatnonzero(which)[:12].reshape(-1, 3).tolist()
        for which in (~IS_POSITIVE, IS_POSITIVE)
    ],
}
OF_THREE = {name: CASES[name] for name in ("weights", "fewer micro-batches")}
OF_TWO = {
    name: case for name, case in CASES.items() if name != "fewer micro-batches"
}
OTHERS = {
    "heads": {"steps": 1, "size": 8, "heads": True},
    "whole": {**STEPS, "whole": True},
    "stops": {**STEPS, "stops": True},
    "killed": {**STEPS, "killed": True},
    "validates": {**STEPS, "cut": 3, "validates": True},
    "plain": {**STEPS, "plain": True},
    # The part of a process is a micro-batch.
    "measures": {**STEPS, "measures": True, "alone": 4, "examples": 64},
    "normalizes": {
        **STEPS,
        "normalizes": True,
        "reduction": "sum_over_batch_size",
        "examples": 64,
        "alone": 4,
    },
}


ALONE = ("normalizes", "measures")


@functools.cache
def ran(count):
    """All cases in so many processes: to start them takes longest."""
    cases = {
        1: {**CASES, **{name: OTHERS[name] for name in ALONE}},
        2: {**OF_TWO, **OTHERS},
        3: OF_THREE,
    }[count]
    return dict(zip(cases, processes.run(count, [*cases.values()])))


def assert_alike(many, one, rtol=1e-5):
    """Every process has what a single one has."""
    for each in many:
        assert each["updates"] == one["updates"]
        for ours, large in zip(each["weights"], one["weights"]):
            np.testing.assert_allclose(ours, large, rtol=rtol, atol=1e-6)
        for name, values in one["history"].items():
            mine = each["history"][name]
            np.testing.assert_allclose(mine, values, rtol=rtol)
        assert each["weights"] == many[0]["weights"]


IN_PROCESSES = [
    *((name, 2) for name in OF_TWO),
    *((name, 3) for name in OF_THREE),
]


@only_on_torch
@needs_wrapping
@pytest.mark.parametrize(("name", "count"), IN_PROCESSES)
def test_processes_train_as_one(name, count):
    """With one all-reduce an update."""
    (one,) = ran(1)[name]
    many = ran(count)[name]
    assert_alike(many, one)
    weights = sum(map(len, one["weights"]))
    for each in many:
        large = [n for n in each["all_reduces"] if n >= weights]
        # At the end of an epoch they may have to ask who has more.
        assert 0 <= len(large) - one["updates"] <= 2
        # A check, and Keras's: of four numbers, at its first step and in each
        # of two epochs; and how many were skipped.
        assert len(each["all_reduces"]) - len(large) <= 1 + 3 * 4 + 2


@only_on_torch
@needs_wrapping
def test_normalization_pools_processes():
    """Each has the moving statistics of all, as if one had them all."""
    (one,) = ran(1)["normalizes"]
    assert_alike(ran(2)["normalizes"], one)


@only_on_torch
@needs_wrapping
def test_processes_measure_the_gradients_of_all():
    """Norm and noise scale are those of as many micro-batches in one."""
    (one,) = ran(1)["measures"]
    assert np.isfinite(one["history"]["noise_scale"]).all()
    assert_alike(ran(2)["measures"], one, rtol=1e-4)


@only_on_torch
@needs_wrapping
def test_one_process_stops_all():
    """At the end of the epoch, and none waits for another."""
    first, second = ran(2)["stops"]
    assert first["weights"] == second["weights"]
    assert [len(each["history"]["loss"]) for each in (first, second)] == [1, 1]


@only_on_torch
@needs_wrapping
def test_processes_go_on_from_checkpoints():
    """Law 6: each from its own, as if nothing had happened."""
    (one,) = ran(1)["weights"]
    second = {name: log[1:] for name, log in one["history"].items()}
    assert_alike(ran(2)["killed"], {**one, "history": second})


@only_on_torch
@needs_wrapping
def test_processes_validate_batches_of_their_own():
    """Some are cut and others not: none waits for another."""
    first, second = ran(2)["validates"]
    assert first["history"] == second["history"]
    assert len(first["history"]["val_loss"]) == 2


@only_on_torch
@needs_wrapping
def test_a_process_finds_its_own_size():
    """The other one has memory."""
    first, second = ran(2)["auto"]
    assert (first["told"], second["told"]) == ([2], [16])


@only_on_torch
@needs_wrapping
def test_denominators_that_differ_between_processes_are_told():
    """Each process has one micro-batch a window, so nothing to compare."""
    for each in ran(2)["heads"]:
        (message,) = each["told"]
        assert "proportions that differ by" in message


@only_on_torch
@needs_wrapping
def test_losses_of_the_whole_batch_are_refused_in_processes():
    """Outputs are not gathered."""
    for each in ran(2)["whole"]:
        (message,) = each["told"]
        assert "Received: a model of 2 replicas" in message


@only_on_torch
def test_a_process_that_adds_nothing_is_told_to_all():
    """Its sums are not those of the others, and none waits for them."""
    case = {**STEPS, "by_hand": True, "silent": True}
    for each in processes.run(2, [case])[0]:
        (message,) = each["told"]
        assert "Each process must have trained on a micro-batch" in message


@only_on_torch
def test_models_in_parts_are_refused(monkeypatch):
    """Each process must hold the whole model."""
    parallel = object.__new__(keras.distribution.ModelParallel)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: parallel)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match="Received: a ModelParallel"):
        model.fit(
            np.ones((4, 1)),
            np.ones((4, 1)),
            batch_size=2,
            callbacks=[GradientAccumulationCallback(2)],
        )


@only_on_torch
@needs_wrapping
def test_plain_keras_is_another_run():
    """What the tests above would see."""
    (one,) = ran(1)["weights"]
    first, second = ran(2)["plain"]
    assert first["updates"] > one["updates"]
    assert first["weights"] == second["weights"]


@only_on_torch
def test_a_loop_of_ones_own_in_processes():
    """With any Keras: `GradientAccumulator(process_group=...)`."""
    cases = [{**STEPS, "by_hand": True, "first": n} for n in (None, 1)]
    for (one,), many in zip(processes.run(1, cases), processes.run(2, cases)):
        assert_alike(many, one)


@only_on_torch
def test_the_program_of_the_page_runs_in_processes(tmp_path):
    """As `torchrun` starts it."""
    (program,) = (
        text for mark, text in examples_of("devices") if mark == "in processes"
    )
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", str(path)),
        ],
        capture_output=True,
        text=True,
        timeout=processes.SECONDS,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stderr
    # Some versions tell of the other processes, in lines of their own.
    lines = [line for line in done.stdout.split("\n") if "Gloo" not in line]
    assert "".join(lines) == "22"


@pytest.mark.skipif(BACKEND == "torch", reason="torch has them")
def test_a_process_group_is_pytorchs():
    """Elsewhere it is refused."""
    with pytest.raises(
        RuntimeError, match="`process_group` must be left out where Keras runs"
    ):
        GradientAccumulator(keras.optimizers.SGD(), process_group="world")
