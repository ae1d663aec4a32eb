"""Times what `log_gradients` costs: with it and without it, in turn.

Prints the milliseconds of a micro-batch without it, and the median of pairwise
ratios; twice, so that the noise of the machine is seen: the second ratio is
that of two ways that are alike.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np

from benchmarks import report
from benchmarks.networks import NETWORKS
from benchmarks.speed import BACKEND
from benchmarks.ways import KINDS, LOGGED, STEPS, Way, ratio

WINDOW = 8


class Row(NamedTuple):
    """What it costs for a network.

    Args:
        milliseconds: Of a micro-batch, without it.
        with_it: Times that, with it.
        alike: Times that, without it again.
    """

    network: str
    xla: bool
    milliseconds: float
    with_it: float
    alike: float


def measure(name: str, is_xla: bool, rounds: int) -> Row:
    """Times a network."""
    network = NETWORKS[name]
    ways = [
        Way(way, network, is_xla=is_xla, window=WINDOW)
        for way in (STEPS, LOGGED, STEPS)
    ]
    for _ in range(2):
        for way in ways:
            way.run()
    seconds = [[way.run().seconds for way in ways] for _ in range(rounds)]
    without, with_it, alike = (list(column) for column in zip(*seconds))
    each = 1e3 * float(np.median(without)) / network.micro_batches
    return Row(
        name, is_xla, each, ratio(with_it, without), ratio(alike, without)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients", description=__doc__
    )
    add = parser.add_argument
    add("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    add("--quick", action="store_true", help="without XLA")
    add("--rounds", type=int, default=11)
    add("--csv", metavar="FILE", help="write the rows into FILE")
    options = parser.parse_args(arguments)
    print(report.machine())
    print(f"{'network':22} {'':4} {'ms':>7} {'with it':>8} {'alike':>6}")
    kinds = KINDS[BACKEND][: 1 if options.quick else None]
    found = []
    for name, is_xla in itertools.product(options.networks, kinds):
        row = measure(name, is_xla, options.rounds)
        found.append(row)
        print(
            f"{row.network:22} {'XLA' if row.xla else '':4} "
            f"{row.milliseconds:7.2f} {row.with_it:8.2f} {row.alike:6.2f}",
            flush=True,
        )
    if options.csv:
        report.write(found, options.csv)
    return 0


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    sys.exit(main())
