"""Whatever a user does to a model, in whatever order, leaves nothing behind."""

import tempfile
from pathlib import Path

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from kaccum import GradientAccumulationCallback, accumulate
from tests import reference
from tests.backends import BACKEND
from tests.profiles import drawn
from tests.recorders import Stop
from tests.reference import Problem, data, set_values, values_of

MICRO_BATCH = 4
X, Y, _ = data(Problem(examples=14))
ERRORS = st.sampled_from([KeyboardInterrupt, ValueError])
STEPS = st.integers(1, 4)


class Histories(RuleBasedStateMachine):
    """A model that accumulates at times, and a twin that has large batches."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        """A fit that was interrupted is noticed by the model's next use."""
        self.folder.cleanup()
        self.assert_same(logs=[self.fit(m, MICRO_BATCH) for m in self.both])

    @initialize(is_eager=st.booleans())
    def build(self, is_eager):
        self.is_eager = is_eager
        self.is_frozen = False
        self.file = None
        layers = keras.layers
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((reference.FEATURES,)),
                layers.Dense(4, activation="tanh", name="first"),
                layers.Dense(reference.CLASSES, kernel_regularizer="l2"),
            ]
        )
        self.model, self.twin = model, keras.models.clone_model(model)
        self.twin.set_weights(model.get_weights())
        self.compile(keep_optimizer=False)

    @property
    def both(self):
        return self.model, self.twin

    def compile(self, keep_optimizer):
        for model in self.both:
            optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
            if keep_optimizer:
                optimizer = model.optimizer
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(
                optimizer,
                loss,
                metrics=["accuracy"],
                run_eagerly=self.is_eager,
            )
            if not keep_optimizer:
                # An interrupted window leaves it built, no large batch would.
                optimizer.build(model.trainable_variables)
        self.file = None

    def fit(self, model, batch_size, callbacks=(), epochs=1):
        return model.fit(
            X,
            Y,
            batch_size,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        ).history

    def assert_same(self, steps=1, logs=({"none": [0.0]}, {"none": [0.0]})):
        model, twin = map(reference.result_of, self.both, logs)
        reference.assert_same(Problem(steps=steps), model, twin)
        # What rounding there was must not add up.
        set_values(self.model, values_of(self.twin))

    @rule(epochs=st.integers(1, 2))
    def fit_plainly(self, epochs):
        logs = [self.fit(m, MICRO_BATCH, epochs=epochs) for m in self.both]
        self.assert_same(logs=logs)

    @rule(steps=STEPS, epochs=st.integers(1, 2))
    def fit_with_windows(self, steps, epochs):
        callbacks = [GradientAccumulationCallback(steps)]
        micro = self.fit(self.model, MICRO_BATCH, callbacks, epochs)
        large = self.fit(self.twin, MICRO_BATCH * steps, epochs=epochs)
        self.assert_same(steps, [micro, large])

    @rule(
        steps=STEPS,
        batch=st.integers(0, 3),
        is_first=st.booleans(),
        error=ERRORS,
    )
    def interrupt(self, steps, batch, is_first, error):
        callbacks = [Stop(batch, error), GradientAccumulationCallback(steps)]
        callbacks = callbacks[:: 1 if is_first else -1]
        self.stopped(self.model, MICRO_BATCH, callbacks, error)
        updates = (batch + 1) // steps
        if updates:
            callbacks = [Stop(updates - 1, error)]
            self.stopped(self.twin, MICRO_BATCH * steps, callbacks, error)
        self.assert_same(steps)

    def stopped(self, model, batch_size, callbacks, error):
        try:
            self.fit(model, batch_size, callbacks)
        except error:
            return
        raise AssertionError("the fit was not interrupted")

    @rule(steps=STEPS, calls=st.integers(1, 3), is_interrupted=st.booleans())
    def train_in_a_block(self, steps, calls, is_interrupted):
        try:
            with accumulate(self.model, steps):
                for i in range(calls):
                    self.train_on_batch(self.model, i, i + 1)
                if is_interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            calls -= calls % steps
        for start in range(0, calls, steps):
            self.train_on_batch(self.twin, start, min(start + steps, calls))
        self.assert_same(steps)

    def train_on_batch(self, model, first, last):
        rows = slice(first * MICRO_BATCH, last * MICRO_BATCH)
        model.reset_metrics()
        return model.train_on_batch(X[rows], Y[rows], return_dict=True)

    @rule()
    def train_on_one_batch(self):
        logs = [self.train_on_batch(model, 1, 2) for model in self.both]
        self.assert_same(logs=logs)

    @rule()
    def evaluate(self):
        logs = [
            model.evaluate(X, Y, verbose=0, return_dict=True)
            for model in self.both
        ]
        self.assert_same(logs=logs)

    @rule()
    def predict(self):
        outputs = [model.predict(X, verbose=0) for model in self.both]
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)

    @rule(keep_optimizer=st.booleans())
    def recompile(self, keep_optimizer):
        self.compile(keep_optimizer and not self.is_frozen)
        self.assert_same()

    # On JAX Keras needs a gradient for each weight the optimizer knows.
    @precondition(lambda self: not self.is_frozen and BACKEND != "jax")
    @rule()
    def freeze(self):
        """Keras asks for `compile`; eagerly it does without."""
        self.is_frozen = True
        self.set_trainable(False)

    @precondition(lambda self: self.is_frozen)
    @rule()
    def unfreeze(self):
        self.is_frozen = False
        self.set_trainable(True)

    def set_trainable(self, value):
        for model in self.both:
            model.get_layer("first").trainable = value
        if not self.is_eager:
            self.compile(keep_optimizer=True)

    @precondition(lambda self: not self.is_frozen)
    @rule()
    def save_and_load(self):
        """What is saved is as the twin's, which never saw kaccum."""
        files = [Path(self.folder.name, f"{i}.keras") for i in range(2)]
        for model, file in zip(self.both, files):
            model.save(file)
        left = self.model
        self.model, self.twin = map(keras.saving.load_model, files)
        # If its last fit was interrupted, its next use notices.
        self.train_on_batch(left, 0, 1)
        self.assert_same()

    @precondition(lambda self: not self.is_frozen)
    @rule()
    def save_weights(self):
        self.file = Path(self.folder.name, "saved.weights.h5")
        self.model.save_weights(self.file)

    @precondition(lambda self: self.file is not None and not self.is_frozen)
    @rule()
    def load_weights(self):
        """Yesterday's checkpoint, into both."""
        for model in self.both:
            model.load_weights(self.file)
        self.assert_same()


TestHistories = Histories.TestCase
TestHistories.settings = drawn(
    3 if BACKEND == "jax" else 12,
    stateful_step_count=8,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
