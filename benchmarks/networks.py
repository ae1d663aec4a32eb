"""The networks that are measured, each heavy in another place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

CLASSES = 10
VOCABULARY = 30_000


class Network(NamedTuple):
    """A network and how it is trained.

    Args:
        build: Function that returns the model, not compiled, with logits as
            its outputs.
        inputs: Function of the number of examples that returns them.
        micro_batch: How many examples a micro-batch has.
        micro_batches: How many of them a measurement takes.
        steps_per_execution: As in `compile`.
        is_large: Whether it takes minutes to compile it in all ways.
        is_slow_with_xla: Whether that is so for TensorFlow with XLA.
        outputs: The shape of an example's classes.
    """

    build: Callable[[], keras.Model]
    inputs: Callable[[int], np.ndarray]
    micro_batch: int = 8
    micro_batches: int = 64
    steps_per_execution: int = 1
    is_large: bool = False
    is_slow_with_xla: bool = False
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
    x = layers.Embedding(VOCABULARY, 64)(tokens)
    attended = layers.MultiHeadAttention(4, 16)(x, x)
    x = layers.LayerNormalization()(x + attended)
    x = layers.LayerNormalization()(
        x + layers.Dense(64)(layers.Dense(256, activation="relu")(x))
    )
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(CLASSES)(x))


def resnet() -> keras.Model:
    """ResNet50, of images of 64 by 64."""
    return keras.applications.ResNet50(
        weights=None,
        input_shape=(64, 64, 3),
        classes=CLASSES,
        classifier_activation=None,
    )


def encoder(blocks: int = 4, width: int = 512) -> keras.Model:
    """A Transformer encoder, as large as a small BERT: 28.2 M weights.

    Args:
        blocks: How many there are.
        width: The features of a token, a multiple of 64.
    """
    tokens = keras.Input((128,), dtype="int32")
    # Of the tokens: what is made of constants alone is a constant, untrained.
    places = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = layers.Embedding(VOCABULARY, width)(tokens)
    x = layers.LayerNormalization()(x + layers.Embedding(128, width)(places))
    for _ in range(blocks):
        attention = layers.MultiHeadAttention(width // 64, 64, dropout=0.1)
        attended = layers.Dropout(0.1)(attention(x, x))
        x = layers.LayerNormalization()(x + attended)
        inner = layers.Dense(4 * width, activation="gelu")(x)
        inner = layers.Dropout(0.1)(layers.Dense(width)(inner))
        x = layers.LayerNormalization()(x + inner)
    x = layers.Dense(width, activation="tanh")(x[:, 0])
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


def sequences(length: int) -> Callable[[int], np.ndarray]:
    """A function that draws so many sequences of tokens."""

    def inputs(count: int) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.integers(0, VOCABULARY, (count, length), "int32")

    return inputs


NETWORKS = {
    "perceptron": Network(perceptron, normal(1024), 8, 32),
    "convolutional": Network(convolutional, normal(32, 32, 3), 16, 32),
    "batch normalised": Network(
        lambda: convolutional(is_normalized=True),
        normal(32, 32, 3),
        16,
        32,
        is_slow_with_xla=True,
    ),
    "200 variables": Network(many_variables, normal(16), is_slow_with_xla=True),
    "transformer": Network(transformer, sequences(32), 8, 32),
    "tiny, 32 an execution": Network(
        lambda: many_variables(2), normal(16), 8, 512, 32
    ),
    # What people train.
    "ResNet50": Network(resnet, normal(64, 64, 3), 4, 16, is_large=True),
    "encoder": Network(encoder, sequences(128), 2, 16, is_large=True),
}
