"""Times a micro-batch against variables, window and model size.

Without XLA, where starting operations costs most. Prints milliseconds, writes
them as CSV, and draws them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.networks import Network, many_variables, normal, perceptron
from benchmarks.ways import BARE, CUT, KERAS, PLAIN, STEPS, Way, in_turn

GROWTH_WAYS = (PLAIN, KERAS, STEPS, CUT, BARE)
VARIABLES = "variables, window of 8"
WINDOW = "micro-batches in a window"
WEIGHTS = "million weights, window of 8"
TITLES = {
    VARIABLES: "More variables: linear",
    WINDOW: "Longer windows: less",
    WEIGHTS: "More weights: linear",
}


class Row(NamedTuple):
    """Milliseconds of a micro-batch, median over the rounds."""

    axis: str
    size: float
    way: str
    milliseconds: float


def cases(is_quick: bool) -> list[tuple[str, float, Network, int]]:
    """What is measured: axis, size, network, window."""
    counts = (10, 100) if is_quick else (10, 30, 100, 300, 1000)
    windows = (1, 8, 64) if is_quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    widths = (96, 768) if is_quick else (96, 192, 384, 768, 1536, 3072)
    found = []
    for count in counts:
        build = functools.partial(many_variables, count)
        network = Network(build, normal(16), micro_batches=32)
        found.append((VARIABLES, float(count), network, 8))
    build = functools.partial(perceptron, 384)
    network = Network(build, normal(1024), micro_batches=256)
    found += [(WINDOW, float(window), network, window) for window in windows]
    for width in widths:
        weights = (1025 * 4 * width // 3 + 4 * width**2 // 3 + 12 * width) / 1e6
        build = functools.partial(perceptron, width)
        network = Network(build, normal(1024), micro_batches=32)
        found.append((WEIGHTS, weights, network, 8))
    return found


def plot(rows: list[Row], path: str) -> None:
    """Draws milliseconds against each axis into `path`."""
    axis_names = list(dict.fromkeys(row.axis for row in rows))
    figure, grid = report.panels(1, len(axis_names))
    for axes, axis in zip(grid.flat, axis_names):
        for way in GROWTH_WAYS:
            mine = [r for r in rows if (r.axis, r.way) == (axis, way)]
            axes.plot(
                [row.size for row in mine],
                [row.milliseconds for row in mine],
                label=way,
                **report.STYLES[way],
            )
        title = TITLES[axis]
        axes.set(title=title, xlabel=axis, xscale="log", yscale="log")
    grid[0, 0].set_ylabel("time of a micro-batch (ms)")
    report.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer sizes")
    add("--rounds", type=int, default=5)
    add("--csv", metavar="FILE", help="write the rows into FILE")
    add("--plot", metavar="FILE", help="draw the rows into FILE")
    options = parser.parse_args(arguments)
    print(report.machine())
    print(f"{'':30}", *(f"{way:>16}" for way in GROWTH_WAYS))
    rows: list[Row] = []
    ways: list[Way] = []
    for axis, size, network, window in cases(options.quick):
        if axis == WINDOW and rows[-1].axis == WINDOW:
            ways = [way.of(window) for way in ways]
        else:
            ways = [
                Way(way, network, is_xla=False, window=window)
                for way in GROWTH_WAYS
            ]
        for way in ways:
            way.run()
        taken = in_turn(ways, options.rounds)
        mine = [
            Row(axis, size, name, 1e3 * np.median(s) / network.micro_batches)
            for name, s in taken.items()
        ]
        rows += mine
        print(
            f"{size:8.4g} {axis:21.21}",
            *(f"{row.milliseconds:16.2f}" for row in mine),
            flush=True,
        )
    if options.csv:
        report.write(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
