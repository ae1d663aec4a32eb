"""Law 1: N micro-batches are one large batch.

Whole problems are drawn at random where nothing is compiled. What is compiled
is a dozen architectures, on each of which many runs are drawn.
"""

import itertools

import hypothesis
import keras
import pytest
from hypothesis import strategies as st

from tests import reference
from tests.backends import (
    BACKEND,
    COMPILED,
    EXECUTIONS,
    needs_compiling,
    needs_graphs,
    only_on,
)
from tests.profiles import at_night, drawn, is_nightly, nightly
from tests.reference import Problem, check
from tests.strategies import (
    ARCHITECTURES,
    OPTIMIZERS,
    OPTIONS,
    problems,
    runs_of,
)

HAS_DOUBLES = only_on("tensorflow", "torch", reason="64 bits are turned off")


@drawn({"tensorflow": 50, "jax": 12, "torch": 300}[BACKEND])
@hypothesis.given(problems(execution=EXECUTIONS[-1]))
def test_micro_batches_train_as_the_large_batch(problem):
    """Law 1, for whole problems drawn at random."""
    check(problem)


@nightly
@drawn(20)
@hypothesis.given(problems())
def test_compiled_micro_batches_train_as_the_large_batch(problem):
    """Law 1, for problems whose architecture is drawn, too, and compiled."""
    check(problem)


# Beside graphs, XLA is tested less: it compiles anew for each size of a batch.
OF_XLA = ["sum-regularized"]
if "graph" not in COMPILED:
    OF_XLA = list(ARCHITECTURES)
WHAT_IS_COMPILED = [
    pytest.param(
        name,
        execution,
        marks=[nightly] if execution == "xla" and name not in OF_XLA else [],
    )
    for execution in COMPILED
    for name in ARCHITECTURES
]


def way_of(name):
    """How an architecture's batches are asked for: each way is traced apart."""
    place = list(ARCHITECTURES).index(name)
    ways = {"cut": place % 2 == 1, "validation": place % 4 < 2}
    return {} if is_nightly() else ways


@needs_compiling
@pytest.mark.parametrize("name, execution", WHAT_IS_COMPILED)
@drawn({"tensorflow": 8, "jax": 3, "torch": 1}[BACKEND])
@hypothesis.given(data=st.data())
def test_what_is_compiled_trains_as_the_large_batch(name, execution, data):
    """Laws 1 and 10: an architecture is compiled once for all runs."""
    fields = {**ARCHITECTURES[name], **way_of(name), "execution": execution}
    check(data.draw(runs_of(fields, unknown_length=False)))


@needs_compiling
@pytest.mark.parametrize(
    ("name", "execution"),
    [
        *itertools.product(list(ARCHITECTURES)[::2], COMPILED[:1]),
        *at_night(itertools.product(ARCHITECTURES, COMPILED)),
    ],
)
def test_the_oracle_is_keras_own_compiled_fit(name, execution):
    """It runs eagerly and is remembered: as a new model that is compiled."""
    problem = Problem(**ARCHITECTURES[name], execution=execution, steps=1)
    compiled = reference.fit_large(problem, reference.build_model(problem))
    reference.assert_same(problem, compiled, reference.fit_large(problem))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[nightly] if i % 3 else [])
        for i, name in enumerate(ARCHITECTURES)
    ],
)
@drawn(6 if BACKEND != "jax" else 2)
@hypothesis.given(data=st.data())
def test_data_of_unknown_length_trains_as_the_large_batch(name, data):
    """Laws 1 and 4: the end of the data is not known beforehand."""
    fields = {**ARCHITECTURES[name], **way_of(name)}
    fields["execution"] = EXECUTIONS[0]
    check(data.draw(runs_of(fields, unknown_length=True)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_with_the_large_batch(name):
    """Law 1, for each optimizer of Keras."""
    if name == "Muon" and keras.__version__ < "3.15":
        pytest.skip("Muon does not run on TensorFlow before Keras 3.15")
    check(Problem(optimizer=name))


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda o: o[0][0])
@pytest.mark.parametrize(
    "execution", [EXECUTIONS[0], *at_night(EXECUTIONS[1:2])]
)
def test_every_option_acts_once_an_update(options, execution):
    """Law 3: clipping, decay, averages and scales see the whole window."""
    check(Problem(optimizer="SGD", options=options, execution=execution))


@pytest.mark.parametrize("cut", [False, True], ids=["steps", "cut"])
@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": True},
        {"loss_scale": 1024.0},
        {"loss_scale": 1024.0, "execution": "xla"},
        {"loss_scale": 1024.0, "built": False},
        {"regularizer": "l1"},
        {"constraint": "max_norm"},
        {"add_loss": True},
        {"frozen": True},
        {"unused": True},
        {"unused": True, "execution": "eager"},
        {"built": False},
        {"built": False, "execution": "xla"},
        {"kind": "mask", "built": False},
        {"kind": "sum", "regularizer": "l2"},
        {"kind": "sum", "regularizer": "l2", "unknown_length": True},
        {"kind": "sum", "regularizer": "l2", "loss_scale": 64.0},
        {"kind": "mask", "token_weights": True},
        {
            "kind": "mask_mean_with_sample_weight",
            "token_weights": True,
            # Terms cancel, as `tests.strategies.optimizers` says.
            "options": (("epsilon", 1e-3),),
        },
        {"kind": "mask_mean_with_sample_weight"},
        # All padding: the regularizer is all there is.
        {"kind": "mask", "examples": 1, "regularizer": "l2"},
        {"kind": "sum_of_tokens", "token_weights": True},
        {"steps_per_execution": 2},
        {"steps_per_execution": 5, "unknown_length": True},
        {"steps_per_execution": 64, "execution": "xla"},
        {"steps_per_execution": 5, "execution": "eager"},
        {"examples": 1},
        {"examples": 12},
        {"examples": 13, "validation": True},
        pytest.param({"policy": "float64"}, marks=HAS_DOUBLES),
        {"policy": "bfloat16", "optimizer": "SGD"},
        {"policy": "mixed_bfloat16", "optimizer": "SGD"},
        {"policy": "mixed_float16", "optimizer": "SGD"},
        {"policy": "mixed_float16", "optimizer": "SGD", "loss_scale": 256.0},
    ],
    ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()),
)
def test_feature_trains_as_with_the_large_batch(fields, cut):
    """Law 1, feature by feature, in both ways to ask for micro-batches."""
    check(Problem(cut=cut, **fields))


@needs_graphs
@pytest.mark.parametrize(
    ("execution", "cut"),
    [
        ("graph", True),
        ("xla", False),
        *at_night(itertools.product(EXECUTIONS, [False, True])),
    ],
)
def test_sums_that_lend_their_memory(execution, cut, monkeypatch):
    """Laws 1 and 10: large ones, here all, are divided in place and freed."""
    name = "kaccum.backends.tensorflow.arithmetic._is_small"
    monkeypatch.setattr(name, lambda total: False)
    problem = Problem(execution=execution, cut=cut, regularizer="l2")
    model = reference.build_model(problem)
    for _ in range(2):
        result = reference.fit_micro(problem, model)
    truth = reference.build_model(problem.truth)
    for _ in range(2):
        true = reference.fit_large(problem, truth)
    reference.assert_same(problem, result, true)
