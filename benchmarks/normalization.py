"""Trains a residual network with batch normalisation on handwritten digits.

With a large batch, with kaccum and with Keras's own accumulation, several seeds
each. Prints the validation accuracy, epoch by epoch, and how far the moving
statistics are from those of the large batch, and draws the accuracy.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from benchmarks import report
from benchmarks.ways import KERAS, LARGE, STEPS
from kaccum import GradientAccumulationCallback
from kaccum.__main__ import load_digits

MICRO_BATCH = 8
WINDOW = 16


class Row(NamedTuple):
    """A run: accuracies in [0, 1] by epoch, and its moving statistics."""

    way: str
    seed: int
    accuracies: list[float]
    statistics: list[np.ndarray]


def residual_network() -> keras.Model:
    """Three residual blocks, a normalisation behind each convolution."""
    inputs = keras.Input((8, 8, 1))
    x = _normalized(16)(inputs)
    for filters, strides in ((16, 1), (32, 2), (32, 1)):
        shortcut = x
        if strides > 1:
            shortcut = layers.Conv2D(filters, 1, strides=strides)(x)
        x = layers.ReLU()(_normalized(filters, strides)(x))
        x = layers.ReLU()(_normalized(filters)(x) + shortcut)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def _normalized(filters: int, strides: int = 1) -> Any:
    convolution = layers.Conv2D(
        filters, 3, strides=strides, padding="same", use_bias=False
    )
    normalization = layers.BatchNormalization(momentum=0.9)
    return lambda x: normalization(convolution(x))


def train(way: str, seed: int, epochs: int) -> Row:
    """Trains in one way from one start."""
    keras.utils.set_random_seed(seed)
    x, y = load_digits()
    model = residual_network()
    steps = WINDOW if way == KERAS else None
    model.compile(
        keras.optimizers.Adam(3e-3, gradient_accumulation_steps=steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # The same order of examples in all ways.
    keras.utils.set_random_seed(seed)
    history = model.fit(
        x[:1437],
        y[:1437],
        batch_size=MICRO_BATCH * (WINDOW if way == LARGE else 1),
        epochs=epochs,
        validation_data=(x[1437:], y[1437:]),
        validation_batch_size=360,
        callbacks=[GradientAccumulationCallback(WINDOW)] * (way == STEPS),
        verbose=0,
    ).history
    statistics = [
        value.numpy()
        for layer in model.layers
        if isinstance(layer, layers.BatchNormalization)
        for value in (layer.moving_mean, layer.moving_variance)
    ]
    return Row(way, seed, history["val_accuracy"], statistics)


def far_off(row: Row, truth: Row) -> float:
    """Median over the layers' statistics of the relative distance."""
    return float(
        np.median(
            [
                np.linalg.norm(mine - true) / np.linalg.norm(true)
                for mine, true in zip(row.statistics, truth.statistics)
            ]
        )
    )


def plot(rows: list[Row], path: str) -> None:
    """Draws mean, lowest and highest accuracy by epoch into `path`."""
    figure, grid = report.panels(1, 1)
    figure.set_size_inches(7, 4)
    axes = grid[0, 0]
    for way in dict.fromkeys(row.way for row in rows):
        runs = np.array([row.accuracies for row in rows if row.way == way])
        epochs = np.arange(1, runs.shape[1] + 1)
        name = "kaccum" if way == STEPS else way
        style = report.STYLES[way]
        axes.plot(epochs, runs.mean(axis=0), label=name, **style)
        low, high = runs.min(axis=0), runs.max(axis=0)
        axes.fill_between(epochs, low, high, alpha=0.15, color=style["color"])
    axes.set(
        title="kaccum's accuracy rises with the large batch's",
        xlabel="epoch",
        ylabel="validation accuracy",
    )
    axes.set_xticks(epochs[:: max(1, len(epochs) // 10)])
    report.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.normalization", description=__doc__
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, three epochs")
    add("--seeds", type=int, default=5)
    add("--epochs", type=int, default=20)
    add("--csv", metavar="FILE", help="write the rows into FILE")
    add("--plot", metavar="FILE", help="draw the rows into FILE")
    options = parser.parse_args(arguments)
    seeds = 1 if options.quick else options.seeds
    epochs = 3 if options.quick else options.epochs
    print(report.machine())
    print(f"{'way':12} seed  statistics off by  validation accuracy by epoch")
    rows: list[Row] = []
    for seed in range(seeds):
        truth = None
        for way in (LARGE, STEPS, KERAS):
            row = train(way, seed, epochs)
            truth = truth or row
            rows.append(row)
            print(
                f"{way:12} {seed:4} {far_off(row, truth):18.1e} ",
                *(f"{accuracy:.3f}" for accuracy in row.accuracies),
                flush=True,
            )
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["way", "seed", *range(1, epochs + 1)])
            writer.writerows([r.way, r.seed, *r.accuracies] for r in rows)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
