"""What `whole_batch_loss` costs: time in one process, memory in one each.

Prints how long a micro-batch takes, with the option and without it, relative
to `steps` without it and to the large batch; and the peak memory above what a
process held before `fit`, relative to `micro_batch_size` without it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np

from benchmarks import memory, report
from benchmarks.networks import NETWORKS, Network, normal, segmentation
from benchmarks.speed import BACKEND
from benchmarks.ways import (
    CUT,
    KINDS,
    LARGE,
    STEPS,
    WHOLE_CUT,
    WHOLE_STEPS,
    Way,
    in_turn,
    ratio,
)

WINDOW = 8
TIMED_WAYS = (STEPS, CUT, WHOLE_STEPS, WHOLE_CUT, LARGE)
MEASURED_WAYS = (CUT, WHOLE_CUT, LARGE)
TIMED = {
    **{
        name: NETWORKS[name]
        for name in ("perceptron", "convolutional", "transformer")
    },
    "segmentation": Network(
        segmentation, normal(64, 64, 3), 4, 32, outputs=(64, 64)
    ),
}


class Row(NamedTuple):
    """A way to train a network.

    Args:
        value: Milliseconds of a micro-batch, or MiB of peak memory.
        to_without: Times `steps` without the option, or `micro_batch_size`.
        to_large: Times the large batch.
    """

    measure: str
    network: str
    xla: bool
    way: str
    value: float
    to_without: float
    to_large: float


def times(name: str, is_xla: bool, rounds: int) -> Iterator[Row]:
    """Times a network, all ways in turn."""
    network = TIMED[name]
    ways = [
        Way(way, network, is_xla=is_xla, window=WINDOW) for way in TIMED_WAYS
    ]
    in_turn(ways, 2)
    seconds = in_turn(ways, rounds)
    for way, mine in seconds.items():
        yield Row(
            "ms",
            name,
            is_xla,
            way,
            1e3 * float(np.median(mine)) / network.micro_batches,
            ratio(mine, seconds[STEPS]),
            ratio(mine, seconds[LARGE]),
        )


def peaks(name: str, is_xla: bool, processes: int) -> Iterator[Row]:
    """Measures the peaks of a network, the median of some processes each."""
    found = {
        way: float(
            np.median(
                [
                    memory.in_another_process(name, is_xla, way).peak
                    for _ in range(processes)
                ]
            )
        )
        for way in MEASURED_WAYS
    }
    for way, peak in found.items():
        of = (peak / found[other] for other in (CUT, LARGE))
        yield Row("MiB", name, is_xla, way, peak, *of)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_batch", description=__doc__
    )
    add = parser.add_argument
    add("--networks", nargs="*", choices=TIMED, default=list(TIMED))
    add("--quick", action="store_true", help="without XLA")
    add("--rounds", type=int, default=7, help="of the times")
    add("--repeat", type=int, default=3, help="processes for a peak; 0: none")
    add("--csv", metavar="FILE", help="write the rows into FILE")
    options = parser.parse_args(arguments)
    print(report.machine())
    head = f"{'':3} {'network':13} {'':4} {'way':17} {'':>8}"
    print(f"{head}  /without /large batch")
    rows = []
    kinds = KINDS[BACKEND][: 1 if options.quick else None]
    cases = [(name, kind) for name in options.networks for kind in kinds]
    measured = [*memory.NETWORKS, *memory.FURTHER]
    of_memory = [case for case in cases if case[0] in measured]
    for measure, count, found in [
        (times, options.rounds, cases),
        (peaks, options.repeat, of_memory),
    ]:
        for case in found if count else []:
            for row in measure(*case, count):
                rows.append(row)
                print(
                    f"{row.measure:3} {row.network:13} "
                    f"{'XLA' if row.xla else '':4} {row.way:17} "
                    f"{row.value:8.1f} {row.to_without:9.2f} "
                    f"{row.to_large:12.2f}",
                    flush=True,
                )
    if options.csv:
        report.write(rows, options.csv)
    return 0


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    sys.exit(main())
