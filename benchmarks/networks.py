"""The networks that are measured, each heavy in another place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

CLASSES = 10


class Network(NamedTuple):
    """A network and how it is trained.

    Args:
        build: Function that returns the model, not compiled, with logits as
            its outputs.
        inputs: Function of the number of examples that returns them.
        micro_batch: How many examples a micro-batch has.
        micro_batches: How many of them a measurement takes.
        steps_per_execution: As in `compile`.
        windows: How many micro-batches make an update, one after the other.
        outputs: The shape of an example's classes.
    """

    build: Callable[[], keras.Model]
    inputs: Callable[[int], np.ndarray]
    micro_batch: int = 8
    micro_batches: int = 64
    steps_per_execution: int = 1
    windows: tuple[int, ...] = (8, 2, 32)
    outputs: tuple[int, ...] = ()

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and classes of a measurement."""
        count = self.micro_batch * self.micro_batches
        shape = (count, *self.outputs)
        classes = np.random.default_rng(1).integers(0, CLASSES, shape)
        return self.inputs(count), classes.astype("int32")


def perceptron(width: int = 1536) -> keras.Model:
    """Dense layers: with a small batch, the optimizer takes most time.

    Args:
        width: The number of units, a multiple of 3. 1536 make 5.3 M weights.
    """
    return keras.Sequential(
        [
            keras.Input((1024,)),
            layers.Dense(4 * width // 3, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


def convolutional(is_normalized: bool = False) -> keras.Model:
    """Few weights that are used often: the gradient takes most time.

    Args:
        is_normalized: Whether each convolution has a `BatchNormalization`.
    """
    stack = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 64):
        stack.append(
            layers.Conv2D(filters, 3, padding="same", activation="relu")
        )
        if is_normalized:
            stack.append(layers.BatchNormalization())
        stack.append(layers.MaxPooling2D())
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(CLASSES)])


def many_variables(count: int = 200) -> keras.Model:
    """A chain of small layers: starting operations takes most time.

    Args:
        count: The number of variables, even.
    """
    chain = [layers.Dense(16, activation="tanh") for _ in range(count // 2 - 1)]
    return keras.Sequential([keras.Input((16,)), *chain, layers.Dense(CLASSES)])


def transformer() -> keras.Model:
    """A Transformer block behind an embedding whose gradient is sparse."""
    tokens = keras.Input((32,), dtype="int32")
    x = layers.Embedding(30_000, 64)(tokens)
    attended = layers.MultiHeadAttention(4, 16)(x, x)
    x = layers.LayerNormalization()(x + attended)
    x = layers.LayerNormalization()(
        x + layers.Dense(64)(layers.Dense(256, activation="relu")(x))
    )
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(CLASSES)(x))


def segmentation(width: int = 16) -> keras.Model:
    """A small U-Net: outputs that are as large as the inputs, and larger.

    Args:
        width: The number of filters of its outermost convolutions.
    """

    def convolved(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    inputs = keras.Input((64, 64, 3))
    fine = convolved(inputs, width)
    coarse = convolved(layers.MaxPooling2D()(fine), 2 * width)
    again = layers.Concatenate()([fine, layers.UpSampling2D()(coarse)])
    return keras.Model(
        inputs, layers.Conv2D(CLASSES, 1)(convolved(again, width))
    )


def normal(*shape: int) -> Callable[[int], np.ndarray]:
    """A function that draws so many inputs of a shape."""

    def inputs(count: int) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.normal(size=(count, *shape)).astype("float32")

    return inputs


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 30_000, (count, 32), "int32")


NETWORKS = {
    "perceptron": Network(perceptron, normal(1024), 8, 32),
    "convolutional": Network(convolutional, normal(32, 32, 3), 16, 32),
    "batch normalised": Network(
        lambda: convolutional(is_normalized=True),
        normal(32, 32, 3),
        16,
        32,
        windows=(8,),
    ),
    # XLA compiles it for half a minute, for each window of some ways.
    "200 variables": Network(many_variables, normal(16), windows=(8,)),
    "transformer": Network(transformer, _tokens, 8, 32),
    "tiny, 32 an execution": Network(
        lambda: many_variables(2), normal(16), 8, 512, 32, (8,)
    ),
}
