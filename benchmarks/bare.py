"""Accumulation by hand, for each backend: the least work there is.

No logs, no callbacks, micro-batches of one size and no short window: a function
that adds, and one that adds and applies.
"""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np


class Loop:
    """A training loop with Adam.

    Args:
        model: What to train.
        loss: Its loss.
        is_xla: Whether XLA compiles the steps.
    """

    def __init__(self, model: keras.Model, loss: Any, is_xla: bool) -> None:
        self.model, self.loss, self.is_xla = model, loss, is_xla
        self.optimizer = keras.optimizers.Adam()
        self.optimizer.build(model.trainable_variables)
        self.prepare()

    def prepare(self) -> None:
        """Makes the sums and the functions."""
        raise NotImplementedError

    def add(self, batches: Any) -> Any:
        """Adds the gradients of the next batch; returns its loss."""
        raise NotImplementedError

    def update(self, batches: Any, window: int) -> Any:
        """The same, and makes the update."""
        raise NotImplementedError

    def train(self, data: Any, window: int) -> float:
        """Trains on batches, `window` of them an update.

        Returns:
            The seconds it took.
        """
        started = time.perf_counter()
        batches, loss = iter(data), None
        for i in range(len(data)):
            if (i + 1) % window:
                loss = self.add(batches)
            else:
                loss = self.update(batches, window)
        keras.ops.convert_to_numpy(loss)
        return time.perf_counter() - started


class _TensorFlow(Loop):
    def prepare(self) -> None:
        import tensorflow as tf

        variables = [v.value for v in self.model.trainable_variables]
        sums = [tf.Variable(tf.zeros_like(v)) for v in variables]

        def add(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self.loss(y, self.model(x, training=True))
            gradients = tape.gradient(loss, variables)
            for total, gradient in zip(sums, gradients):
                if isinstance(gradient, tf.IndexedSlices):
                    total.scatter_add(gradient)
                else:
                    total.assign_add(gradient)
            return loss

        def update(x: Any, y: Any, share: Any) -> Any:
            loss = add(x, y)
            self.optimizer.apply(
                [total * share for total in sums],
                self.model.trainable_variables,
            )
            for total in sums:
                total.assign(tf.zeros_like(total))
            return loss

        compiled_add = tf.function(add, jit_compile=self.is_xla)
        compiled_update = tf.function(update, jit_compile=self.is_xla)
        # The graph pulls its data, which XLA cannot.
        self._add = tf.function(lambda batches: compiled_add(*next(batches)))
        self._update = tf.function(
            lambda batches, share: compiled_update(*next(batches), share)
        )

    def add(self, batches: Any) -> Any:
        return self._add(batches)

    def update(self, batches: Any, window: int) -> Any:
        return self._update(batches, np.float32(1.0 / window))


class _Jax(Loop):
    def prepare(self) -> None:
        import jax
        import jax.numpy as jnp

        model, optimizer = self.model, self.optimizer
        self._weights = [v.value for v in model.trainable_variables]
        self._others = [v.value for v in model.non_trainable_variables]
        self._state = [v.value for v in optimizer.variables]
        self._sums = [jnp.zeros_like(v) for v in self._weights]

        def loss_of(weights: Any, others: Any, x: Any, y: Any) -> Any:
            y_pred, others = model.stateless_call(
                weights, others, x, training=True
            )
            return self.loss(y, y_pred), others

        def add(weights: Any, others: Any, sums: Any, x: Any, y: Any) -> Any:
            differentiate = jax.value_and_grad(loss_of, has_aux=True)
            (loss, others), gradients = differentiate(weights, others, x, y)
            return loss, others, [s + g for s, g in zip(sums, gradients)]

        def update(
            weights: Any,
            state: Any,
            sums: Any,
            others: Any,
            share: Any,
            x: Any,
            y: Any,
        ) -> Any:
            loss, others, sums = add(weights, others, sums, x, y)
            weights, state = optimizer.stateless_apply(
                state, [s * share for s in sums], weights
            )
            zeros = [jnp.zeros_like(s) for s in sums]
            return loss, weights, state, zeros, others

        self._add = jax.jit(add, donate_argnums=2)
        self._update = jax.jit(update, donate_argnums=(0, 1, 2))

    def add(self, batches: Any) -> Any:
        loss, self._others, self._sums = self._add(
            self._weights, self._others, self._sums, *next(batches)
        )
        return loss

    def update(self, batches: Any, window: int) -> Any:
        loss, self._weights, self._state, self._sums, self._others = (
            self._update(
                self._weights,
                self._state,
                self._sums,
                self._others,
                1.0 / window,
                *next(batches),
            )
        )
        return loss


class _Torch(Loop):
    def prepare(self) -> None:
        import torch

        self._torch = torch
        self._weights = [v.value for v in self.model.trainable_variables]

    def add(self, batches: Any) -> Any:
        x, y = next(batches)
        loss = self.loss(y, self.model(x, training=True))
        # It adds to the weights' `.grad`.
        loss.backward()
        return loss

    def update(self, batches: Any, window: int) -> Any:
        loss = self.add(batches)
        with self._torch.no_grad():
            means = [v.grad for v in self._weights]
            self._torch._foreach_mul_(means, 1.0 / window)
            self.optimizer.apply(means, self.model.trainable_variables)
        self.model.zero_grad()
        return loss


def loop(model: keras.Model, loss: Any, is_xla: bool) -> Loop:
    """The loop of the backend that Keras runs on."""
    kinds = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}
    return kinds[keras.backend.backend()](model, loss, is_xla)
