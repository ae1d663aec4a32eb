"""What is replaced in Keras and JAX: what the table says, and nothing else."""

import ast
import pathlib
import re
import sys
import types

import keras
import numpy as np
import pytest

import kaccum
from kaccum import GradientAccumulationCallback, accumulate
from kaccum.step import hooks
from kaccum.step.hooks import (
    CUTTING,
    EITHER,
    FIT,
    HOOKS,
    MAKING,
    STEP,
    TEST,
    UPDATE,
)
from kaccum.step.training_step import TrainingStep
from tests.backends import BACKEND, needs_graphs, needs_strategies
from tests.reference import strategy_of

PACKAGE = pathlib.Path(kaccum.__file__).parent
PAGE = PACKAGE.parent / "docs" / "what-is-replaced.rst"
X, Y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")


class Look(keras.layers.Layer):
    """Calls a function when the model trains."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def call(self, inputs, training=None):
        if training and not isinstance(inputs, keras.KerasTensor):
            self.look()
        return inputs


def model_that(looks, **options):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), Look(looks), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1), "mse", **options)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *callbacks):
    ours = GradientAccumulationCallback(2)
    options = {"batch_size": 4, "verbose": 0, "callbacks": [ours, *callbacks]}
    return model.fit(X, Y, **options)


def functions_of(model):
    """All functions that a fit may replace, by owner and name."""
    found = {}
    frameworks = ("keras", "jax", "tensorflow", "torch", "numpy")
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in frameworks and module is not None:
            for key, value in list(vars(module).items()):
                if callable(value):
                    found[module, key] = value
                # Without asking the value: some warn when they are looked at.
                is_class = issubclass(type(value), type)
                if is_class and name.startswith("keras"):
                    for inner, method in list(vars(value).items()):
                        found[value, inner] = method
    for owner in (model, model.optimizer, model._compile_loss):
        found[owner, None] = owner
        for key, value in vars(owner).items():
            is_method = callable(value) and hasattr(type(owner), key)
            if is_method or key in ("train_function", "test_function"):
                found[owner, key] = value
    return found


def replaced(before, after):
    """What is another function after than before.

    What has been imported since, and what modules load when they are asked for
    it, was not there to be replaced.
    """
    known = {owner for owner, _ in before}
    return {
        (owner, name)
        for (owner, name), value in after.items()
        if owner in known and before.get((owner, name)) is not value
        if (owner, name) in before or not isinstance(owner, types.ModuleType)
    }


def listed(model, *lasts):
    """What the table says is replaced, by owner and name."""
    found = set()
    step = types.SimpleNamespace(optimizer=model.optimizer, model=model)
    for hook in HOOKS:
        if hook.lasts not in lasts:
            continue
        if hook.lasts in (FIT, CUTTING):
            found.add((model, hook.attribute))
        found |= {(owner, hook.attribute) for owner in hook.owners(step)}
    return found


def test_a_step_replaces_what_the_table_says_and_nothing_else():
    """Both ways, while it runs or is traced."""
    seen = []
    model = model_that(lambda: seen.append(functions_of(model)))
    # Loads, and caches, what a plain fit needs.
    model.fit(X, Y, batch_size=4, verbose=0)
    seen.clear()
    model.make_train_function(force=True)
    before = functions_of(model)
    fit(model)
    during = replaced(before, seen[0])
    assert during == listed(model, FIT, STEP, EITHER)
    after = functions_of(model)
    assert replaced(before, after) <= {(model, "train_function")}
    assert not hasattr(model.train_function, "__self__")


def test_a_fit_replaces_what_the_table_says_and_nothing_else():
    """Between its steps."""
    model = model_that(lambda: None)
    model.fit(X, Y, batch_size=4, verbose=0)
    seen = []

    class Between(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(functions_of(model))

    before = functions_of(model)
    fit(model, Between())
    assert replaced(before, seen[0]) == listed(model, FIT)
    seen.clear()
    with accumulate(model, 2):
        seen.append(functions_of(model))
    assert replaced(before, seen[0]) == listed(model, FIT)


def test_a_validation_that_is_cut_replaces_what_the_table_says():
    """While its step runs or is traced; and between them."""
    seen = []

    class Tested(keras.layers.Layer):
        def call(self, inputs, training=None):
            if training is False and is_begun:
                seen.append(functions_of(model))
            return inputs

    class Begins(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            is_begun.append(True)
            between.append(functions_of(model))

    is_begun, between = [], []
    stack = [keras.Input((4,)), Tested(), keras.layers.Dense(1)]
    model = keras.Sequential(stack)
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.fit(X, Y, verbose=0, validation_data=(X, Y))
    model.make_train_function(force=True)
    model.make_test_function(force=True)
    before = functions_of(model)
    ours = GradientAccumulationCallback(micro_batch_size=2)
    options = {"callbacks": [ours, Begins()], "validation_data": (X, Y)}
    model.fit(X, Y, verbose=0, **options)
    during = listed(model, FIT, CUTTING, TEST, EITHER)
    assert replaced(before, seen[-1]) == during
    assert replaced(before, between[0]) == listed(model, FIT, CUTTING)
    assert replaced(before, functions_of(model)) <= {(model, "train_function")}


@needs_graphs
def test_the_step_is_replaced_while_keras_makes_a_function_of_it():
    """On TensorFlow only, which compiles what stands there."""
    model = model_that(lambda: None)
    made = []
    real = model.make_train_function

    def make(force=False):
        made.append([name for name in vars(model) if name == "train_step"])
        return real(force)

    vars(model)["make_train_function"] = make
    fit(model)
    assert ["train_step"] in made
    made.clear()
    options = {"batch_size": 4, "verbose": 0, "validation_data": (X, Y)}
    real_test = model.make_test_function

    def make_test(force=False):
        made.append([name for name in vars(model) if name == "test_step"])
        return real_test(force)

    vars(model)["make_test_function"] = make_test
    ours = GradientAccumulationCallback(micro_batch_size=2)
    model.fit(X, Y, callbacks=[ours], **options)
    assert ["test_step"] in made
    assert [h.attribute for h in HOOKS if h.lasts == MAKING] == [
        "train_step",
        "test_step",
    ]
    assert not {"train_step", "test_step"} & vars(model).keys()


@needs_strategies
def test_an_update_on_replicas_replaces_what_the_table_says():
    """And no more."""
    seen = []

    class Sees(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.append(vars(self).keys() & set(dir(type(self))))
            return super().apply(grads, trainable_variables)

    with strategy_of(2).scope():
        model = model_that(lambda: None)
        model.compile(Sees(0.1), "mse")
        fit(model)
    assert seen[0] == {h.attribute for h in HOOKS if h.lasts == UPDATE}
    assert not vars(model.optimizer).keys() & set(dir(Sees))


def test_nothing_is_replaced_that_has_no_row():
    """`Patch` is made by the table alone, which knows its rows."""
    makers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = getattr(node, "func", None)
            if isinstance(called, ast.Name) and called.id == "Patch":
                makers.add(path.name)
            # A second way to replace something.
            if isinstance(called, ast.Name) and called.id in (
                "setattr",
                "delattr",
            ):
                assert path.name == "patches.py"
    assert makers == {"hooks.py"}
    with pytest.raises(
        LookupError, match=r"^HOOKS has no row of the model, fit\.$"
    ):
        hooks.replacing("the model", "fit", None, lambda original: original)


def test_the_page_prints_the_table():
    """Row by row: owner, attribute, for how long, since when, what for."""
    text = PAGE.read_text()
    rows = re.findall(r"^   \* - (.*(?:\n     .*)*)", text, re.MULTILINE)
    cells = [
        [" ".join(cell.split()) for cell in re.split(r"\n     - ", row)]
        for row in rows
    ]
    printed = [tuple(row) for row in cells[1:]]
    assert printed == [
        (
            f"``{h.owner}``" if "." in h.owner or h.owner == "jax" else h.owner,
            f"``{h.attribute}``",
            h.lasts.replace("`", "``"),
            h.since,
            h.why.replace("`", "``"),
        )
        for h in HOOKS
    ]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_loss_that_is_reduced_unheard_is_refused(is_told, monkeypatch):
    """A Keras that reduces elsewhere must not be counted by examples.

    Also one that does not tell which losses there are.
    """
    if not is_told:
        monkeypatch.setattr(TrainingStep, "_losses", None)
    others = [h for h in HOOKS if h.attribute != "reduce_weighted_values"]
    assert len(others) == len(HOOKS) - 2
    monkeypatch.setattr(hooks, "HOOKS", tuple(others))
    model = model_that(lambda: None)
    with pytest.raises(
        RuntimeError,
        match=r"^Losses must be reduced by Keras's `reduce_weighted_values`, "
        r"where kaccum hears what they divide by, for a micro-batch to have "
        r"its exact weight\. Received: one that Keras "
        rf"{re.escape(keras.__version__)} reduced elsewhere\. Use a version "
        r"of Keras that the documentation of kaccum names\.(\n|$)",
    ):
        fit(model)
    # Nothing stays.
    monkeypatch.undo()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fit(model)


def test_a_loss_that_reduces_itself_is_counted_by_examples():
    """There was nothing to hear: the loss is the user's own."""

    class Own(keras.losses.Loss):
        def __call__(self, y_true, y_pred, sample_weight=None):
            return keras.ops.mean(keras.ops.square(y_true - y_pred))

    models = [model_that(lambda: None) for _ in range(2)]
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), Own())
    fit(models[0])
    models[1].fit(X, Y, batch_size=8, verbose=0)
    for mine, true in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(mine, true, rtol=1e-5)


def test_every_backend_has_a_row_of_its_own_only_where_it_needs_one():
    """JAX takes gradients of functions; the others have none to replace."""
    model = model_that(lambda: None)
    step = types.SimpleNamespace(optimizer=model.optimizer, model=model)
    owners = {h.owner for h in HOOKS if h.lasts == STEP and h.owners(step)}
    assert ("jax" in owners) == (BACKEND == "jax")
