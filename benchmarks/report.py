"""What the programs print of the machine, and how their plots look."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import keras

from benchmarks.ways import BARE, CUT, KERAS, LARGE, PLAIN, STEPS
from kaccum.backends import backend

STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": "C7", "marker": "o"},
    KERAS: {"color": "C3", "marker": "s"},
    STEPS: {"color": "C0", "marker": "^"},
    CUT: {"color": "C2", "marker": "v"},
    LARGE: {"color": "C1", "marker": "D"},
    BARE: {"color": "C4", "marker": "x", "linestyle": "--"},
}


def machine() -> str:
    """The device, its cores and the versions, in one line."""
    name = keras.backend.backend()
    version = import_module(name).__version__
    return (
        f"{backend().device_name()}, {os.cpu_count()} cores, "
        f"{platform.machine()}; Python {platform.python_version()}, {name} "
        f"{version}, Keras {keras.__version__}"
    )


def write(rows: Sequence[Any], path: str) -> None:
    """Writes rows, named tuples of one kind, as CSV."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([rows[0]._fields, *rows])


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its grid of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 3 * rows), squeeze=False
    )


def label(grid: Any, x: str, y: str) -> None:
    """Names the axes of a grid at its left and its bottom."""
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    for axes in grid[-1]:
        axes.set_xlabel(x)


def save(figure: Any, path: str) -> None:
    """Adds one legend below all panels and writes the picture."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), frameon=False
    )
    space = 0.4 / figure.get_figheight()
    figure.tight_layout(rect=(0, space, 1, 1))
    figure.savefig(path, dpi=110)
    print(f"drawn into {path}")
