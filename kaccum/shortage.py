"""Has the memory of a device run out, and `"auto"` find what fits into it."""

from __future__ import annotations

import gc
from typing import Any

import keras
import numpy as np

from kaccum.backends import backend
from kaccum.callback import GradientAccumulationCallback

UPDATES = 2
# Then the first image is as large as 64 GiB in float32.
LARGEST = 2**14


def build_model(scale: int, steps: int | None = None) -> keras.Model:
    """The demo's network on images of 8 * scale pixels, and as few weights.

    Args:
        scale: How often each pixel is repeated, both ways.
        steps: Of how many micro-batches Keras's own accumulation makes an
            update, if any.
    """
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.UpSampling2D(scale),
            layers.Conv2D(16, 3, padding="same", activation="gelu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="gelu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Adam would divide by gradients that are near zero.
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
    model.compile(optimizer, loss)
    # On PyTorch Keras would run a whole batch to build the loss, before `fit`
    # calls callbacks.
    model.evaluate(np.zeros((1, 8, 8, 1)), np.zeros(1), verbose=0)
    return model


def first_that_runs_out(x: np.ndarray, y: np.ndarray) -> tuple[int, str]:
    """The scale at which a batch does not fit, and what the framework says.

    Args:
        x: A batch of images.
        y: Their digits.

    Raises:
        RuntimeError: If all fit.
    """
    scale = 1
    while scale <= LARGEST:
        model = build_model(scale)
        said = _said(x, y, model)
        gc.collect()
        if said is not None:
            return scale, said
        scale *= 2
    raise RuntimeError(
        "The memory of the device must run out. Received: one in which batches "
        f"of {len(x)} images of {8 * LARGEST} x {8 * LARGEST} pixels fit."
    )


def _said(x: np.ndarray, y: np.ndarray, model: keras.Model) -> str | None:
    """What the framework says where there is no memory for a batch."""
    try:
        model.fit(x, y, batch_size=len(x), verbose=0)
        # JAX tells of an error when what it computes is read.
        model.get_weights()
    except Exception as error:
        if not backend().is_out_of_memory(error):
            raise
        return str(error).strip().splitlines()[0]
    return None


def run_out(
    x: np.ndarray, y: np.ndarray, *, batch_size: int
) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """Trains where the large batch does not fit.

    The truth cannot be the large batch, which does not fit. It is Keras's own
    accumulation of micro-batches of at most half the size that `"auto"` found,
    for which there is memory even where the trials have left it in pieces. Of
    as many examples each, without a rest, under a mean loss, that is the large
    batch, too.

    Args:
        x: At least `UPDATES * batch_size` images of 8 x 8 pixels.
        y: Their digits.
        batch_size: How many make an update.

    Returns:
        What was seen: `pixels` of an image's side, what the framework `said`
        of the large batch, the `micro_batch_size` that `"auto"` found, the
        `updates` made, the `peak_bytes` of the device (or `None`). And the
        weights at the end, and those of the truth.
    """
    count = UPDATES * batch_size
    x, y = x[:count], y[:count]
    scale, said = first_that_runs_out(x[:batch_size], y[:batch_size])
    backend().forget_peak_memory()
    model = build_model(scale)
    callback = GradientAccumulationCallback(micro_batch_size="auto")
    fit: dict[str, Any] = {"verbose": 0, "shuffle": False}
    model.fit(x, y, batch_size=batch_size, callbacks=[callback], **fit)
    updates = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    weights, peak = model.get_weights(), backend().peak_memory()
    found = callback.micro_batch_size
    assert isinstance(found, int)
    del model, callback
    gc.collect()
    sizes = range(max(found // 2, 1), 0, -1)
    size = next(size for size in sizes if batch_size % size == 0)
    own = build_model(scale, batch_size // size)
    own.fit(x, y, batch_size=size, **fit)
    seen = {
        "pixels": 8 * scale,
        "said": said,
        "micro_batch_size": found,
        "updates": updates,
        "peak_bytes": peak,
    }
    return seen, weights, own.get_weights()
