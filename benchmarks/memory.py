"""Measures the peak memory of each way to train, each in a process of its own.

Prints mebibytes: what the process held before `fit`, how much more it held at
its peak, and how much more than before is still held after `fit`. Linux only.
oneDNN is off: its allocator keeps what was freed, which hides what is.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import layers

from benchmarks import networks, report
from benchmarks.networks import (
    CLASSES,
    Network,
    convolutional,
    normal,
    segmentation,
)
from benchmarks.ways import CUT, KERAS, KINDS, LARGE, PLAIN, STEPS, Way

WINDOW = 8
#: Most bytes above a plain fit's peak, in bytes of the trainable weights, for
#: the network whose weights take the memory.
TARGET = 1.1
HEAVY = "perceptron"
MEMORY_WAYS = (PLAIN, KERAS, STEPS, CUT, LARGE)
NETWORKS = {
    # 72 MiB of weights, and next to no activations.
    HEAVY: Network(
        lambda: square_perceptron(3072), normal(3072), micro_batches=32
    ),
    # Next to no weights, and 64 MiB of activations a micro-batch.
    "convolutional": Network(
        convolutional, normal(32, 32, 3), 256, micro_batches=32
    ),
}
#: What people train: asked for by `--networks`.
TRAINED = {
    name: each for name, each in networks.NETWORKS.items() if each.is_large
}
#: Those of `benchmarks.whole_batch`.
FURTHER = {
    # 5 MiB of outputs a micro-batch, and 1.5 of inputs.
    "segmentation": Network(
        segmentation, normal(64, 64, 3), 32, 32, outputs=(64, 64)
    ),
}


def square_perceptron(width: int) -> keras.Model:
    """Two large matrices: the C library returns those above 32 MiB at once."""
    wide = [layers.Dense(width, activation="relu") for _ in range(2)]
    return keras.Sequential(
        [keras.Input((width,)), *wide, layers.Dense(CLASSES)]
    )


class Row(NamedTuple):
    """A case, in MiB.

    Args:
        weights: The trainable weights.
        before: What the process holds before `fit`.
        peak: How much more than that it holds at most.
        after: How much more than that it holds after `fit`.
    """

    network: str
    xla: bool
    way: str
    weights: float
    before: float
    peak: float
    after: float


def measure(network: str, is_xla: bool, way: str) -> Row:
    """Trains in this process."""
    measured = {**NETWORKS, **TRAINED, **FURTHER}[network]
    trained = Way(way, measured, is_xla=is_xla, window=WINDOW)
    weights = sum(4 * math.prod(v.shape) for v in trained.variables)
    before, peak_before = _held(), _peak()
    for _ in range(2):
        trained.run()
    peak = _peak()
    # What was held at a peak before `fit` would hide a lower one in it.
    if peak <= peak_before:
        raise RuntimeError("The peak was before `fit`: use a larger network.")
    after = _held()
    return Row(
        network,
        is_xla,
        way,
        *(b / 2**20 for b in (weights, before, peak - before, after - before)),
    )


def _peak() -> int:
    # (`ru_maxrss` begins with that of the process that started this one.)
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith("VmHWM")]
    return 1024 * int(lines[0][1])


def _held() -> int:
    gc.collect()
    # Else freed memory may still be the process's.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def in_another_process(*case: Any) -> Row:
    """What `measure` returns of a case."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case"]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run(
        [*command, json.dumps(case)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Row(*json.loads(done.stdout.splitlines()[-1]))


def plot(rows: list[Row], path: str) -> None:
    """Draws the peaks into `path`."""
    cases = list(dict.fromkeys((row.network, row.xla) for row in rows))
    figure, grid = report.panels(1, len(cases))
    for axes, case in zip(grid.flat, cases):
        for i, row in enumerate(r for r in rows if (r[0], r[1]) == case):
            color = report.STYLES[row.way]["color"]
            axes.bar(i, row.peak, color=color, label=row.way)
        axes.set_xticks([])
        axes.set(title=f"{case[0]}, {'' if case[1] else 'no '}XLA")
    report.label(grid, "", "peak above what was\nheld before fit (MiB)")
    report.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0; with `--targets`, 1 if the target is missed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="without XLA, fewer ways")
    add("--repeat", type=int, default=3, help="processes a case, the median")
    add(
        "--networks",
        nargs="*",
        choices=[*NETWORKS, *TRAINED],
        default=list(NETWORKS),
    )
    add("--targets", action="store_true", help="fail where one is missed")
    add("--csv", metavar="FILE", help="write the rows into FILE")
    add("--plot", metavar="FILE", help="draw the rows into FILE")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(measure(*options.case)))
        return 0
    print(report.machine())
    print(
        f"{'network':14} {'':4} {'way':17} {'weights':>8} {'before':>8} "
        f"{'peak':>8} {'after':>8}  above plain"
    )
    rows: list[Row] = []
    all_met = True
    ways = (PLAIN, STEPS, CUT) if options.quick else MEMORY_WAYS
    kinds = KINDS[keras.backend.backend()][: 1 if options.quick else None]
    for network in options.networks:
        for is_xla in kinds:
            plain = None
            for way in ways:
                tried = [
                    in_another_process(network, is_xla, way)
                    for _ in range(1 if options.quick else options.repeat)
                ]
                row = sorted(tried, key=lambda r: r.peak)[len(tried) // 2]
                plain = plain or row
                rows.append(row)
                above = row.peak - plain.peak
                is_met = above <= TARGET * row.weights
                is_met = is_met or network != HEAVY or way not in (STEPS, CUT)
                all_met = all_met and is_met
                print(
                    f"{network:14} {'XLA' if is_xla else '':4} {way:17} "
                    + " ".join(f"{number:8.0f}" for number in row[3:])
                    + f" {above:12.0f}{'' if is_met else '  target missed'}",
                    flush=True,
                )
    if options.csv:
        report.write(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)
    return 1 if options.targets and not all_met else 0


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    sys.exit(main())
