"""Times the ways to train on large batches, in turn, in one process.

Prints the milliseconds of a micro-batch and how they compare, writes them as
CSV, and draws them. A plain fit is measured twice in each round: how far that
ratio is from 1 is the noise. With `--check FILE`, of rows that `--csv` wrote on
the same machine, the program fails where kaccum has become slower than that.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from benchmarks import report
from benchmarks.networks import NETWORKS
from benchmarks.ways import (
    AGAIN,
    BARE,
    CUT,
    KERAS,
    KINDS,
    LARGE,
    PLAIN,
    STEPS,
    WAYS,
    Again,
    Run,
    Way,
    in_turn,
    ratio,
)

BACKEND = keras.backend.backend()
#: Of both ways of kaccum, in windows of 8: at most so many times the bare loop,
TO_BARE = 1.05
#: and Keras's own: the first one where the bare loop is below that.
TO_KERAS = (0.95, 1.02)
#: Where calls take most of the time: at most so many times a plain fit alone.
TO_PLAIN = {"tiny, 32 an execution": 1.5}
#: As of `--check`: noise that there always is, and more than can be compared.
NOISE = (0.05, 0.25)


class Row(NamedTuple):
    """A case: how long a micro-batch takes, and how it compares.

    Args:
        milliseconds: Median over the rounds.
        to_plain: Median of pairwise ratios to the plain fit with micro-batches.
        to_keras: The same to Keras's own accumulation.
        to_bare: The same to the loop by hand.
        to_large: The same to the large batch.
        first_update: Seconds to the first update, with all that is compiled.
        traces: How often the training step was traced until then.
        later_traces: How often after that, in all further fits.
        backend: That of Keras.
    """

    network: str
    xla: bool
    window: int
    way: str
    milliseconds: float
    to_plain: float
    to_keras: float
    to_bare: float
    to_large: float
    first_update: float
    traces: int
    later_traces: int
    backend: str = BACKEND

    @property
    def case(self) -> tuple[Any, ...]:
        """What it has in common with a row that it is compared with."""
        return (*self[:4], self.backend)


def measure(
    name: str, is_xla: bool, windows: Sequence[int], rounds: int
) -> Iterator[Row]:
    """Measures a network, window after window."""
    network = NETWORKS[name]
    ways: list[Way] = []
    firsts: dict[str, Run] = {}
    for window in windows:
        ways = [way.of(window) for way in ways] or [
            Way(each, network, is_xla=is_xla, window=window) for each in WAYS
        ]
        for way in ways:
            if way.is_new:
                firsts[way.name] = way.first_update()
            if not network.is_large:
                way.run()
        seconds = in_turn([*ways, Again(ways[0])], rounds)
        traces = {way.name: way.traces for way in ways}
        for name_of_way, mine in seconds.items():
            first = firsts.get(name_of_way, Run(0.0, 0.0, 0))
            yield Row(
                network=name,
                xla=is_xla,
                window=window,
                way=name_of_way,
                milliseconds=1e3 * np.median(mine) / network.micro_batches,
                to_plain=ratio(mine, seconds[PLAIN]),
                to_keras=ratio(mine, seconds[KERAS]),
                to_bare=ratio(mine, seconds[BARE]),
                to_large=ratio(mine, seconds[LARGE]),
                first_update=first.all_seconds,
                traces=first.traces,
                later_traces=traces.get(name_of_way, 0) - first.traces,
            )


def cases(
    names: Sequence[str] | None, *, is_quick: bool = False
) -> Iterator[tuple[str, bool]]:
    """What is measured: networks, and whether XLA compiles them.

    Args:
        names: Of `NETWORKS`. None stands for what ten minutes are enough for.
        is_quick: Whether to leave XLA out where there is both.
    """
    kinds = KINDS[BACKEND][: 1 if is_quick else None]
    for name in NETWORKS if names is None else names:
        network = NETWORKS[name]
        for is_xla in kinds:
            is_slow = network.is_slow_with_xla and is_xla and len(kinds) > 1
            if names is not None or not (network.is_large or is_slow):
                yield name, is_xla


def missed(rows: Sequence[Row]) -> list[str]:
    """The targets that kaccum misses."""
    least = {row[:3]: row.to_keras for row in rows if row.way == BARE}
    found = []
    for row in rows:
        if row.way not in (STEPS, CUT) or row.window != 8:
            continue
        if row.network in TO_PLAIN:
            limits = [(row.to_plain, PLAIN, TO_PLAIN[row.network])]
        else:
            of_keras = TO_KERAS[least[row[:3]] > TO_KERAS[0]]
            limits = [
                (row.to_bare, BARE, TO_BARE),
                (row.to_keras, KERAS, of_keras),
            ]
        found += [
            f"{row.network}, {'' if row.xla else 'no '}XLA, {row.way}: "
            f"{value:.2f} of {other}, target {limit:.2f}"
            for value, other, limit in limits
            if value > limit
        ]
    return found


def noise(rows: Sequence[Row], case: Any = None) -> float:
    """How far from 1 the ratio of a plain fit to itself was, at most.

    Args:
        rows: Of all cases.
        case: That of one; by default any.
    """
    found = (
        abs(row.to_plain - 1)
        for row in rows
        if row.way == AGAIN and case in (None, row.case)
    )
    return max(found, default=0.0)


def read(path: str) -> list[Row]:
    """Rows that `--csv` wrote."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    kinds: dict[str, Callable[[str], Any]]
    kinds = dict.fromkeys(("network", "way", "backend"), str)
    kinds["xla"] = "True".__eq__
    kinds |= dict.fromkeys(("window", "traces", "later_traces"), int)
    return [
        Row(**{key: kinds.get(key, float)(line[key]) for key in Row._fields})
        for line in lines
    ]


def slower(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """What kaccum takes longer for than it did, or what cannot tell.

    What has become slower has become so compared with each other way, which
    kaccum is no part of. A ratio alone may be that of another way: a plain fit
    took 26 ms in one process and 15 in the next one, all three rounds. A median
    of a few rounds differs from the next one, also where a plain fit's did not:
    noise is at least the first of `NOISE`.
    """
    old = {row.case: row for row in before}
    found = []
    for row in rows:
        if row.way not in (STEPS, CUT):
            continue
        text = (
            f"{row.network}, {'' if row.xla else 'no '}XLA, window of "
            f"{row.window}, {row.way}: {row.to_plain:.2f} of a plain fit"
        )
        again = row._replace(way=AGAIN).case
        off = noise([*rows, *before], again)
        if row.case not in old:
            found.append(f"{text}, and nothing to compare it with")
        elif off > NOISE[1]:
            found.append(f"{text}: too noisy, by {off:.0%}, to compare it")
        elif _growth(row, old[row.case]) > 1 + NOISE[0] + off:
            found.append(f"{text}, {old[row.case].to_plain:.2f} before")
    return found


def _growth(row: Row, before: Row) -> float:
    """The least that a way's ratios have grown by."""
    names = ("to_plain", "to_keras", "to_bare", "to_large")
    return min(getattr(row, name) / getattr(before, name) for name in names)


def line(row: Row) -> str:
    """A row of the printed table."""
    return (
        f"{row.network:22} {'XLA' if row.xla else '':4} {row.window:6} "
        f"{row.way:17} {row.milliseconds:8.2f} {row.to_plain:6.2f} "
        f"{row.to_keras:6.2f} {row.to_bare:6.2f} {row.to_large:6.2f} "
        f"{row.first_update:7.2f} "
        f"{row.traces:3} +{row.later_traces}"
    )


HEAD = (
    f"{'network':22} {'':4} {'window':>6} {'way':17} {'ms/micro':>8} "
    f"{'/plain':>6} {'/Keras':>6} {'/bare':>6} {'/large':>6} {'first s':>7} "
    "traces"
)


def plot(rows: list[Row], path: str) -> None:
    """Draws milliseconds against the window into `path`."""
    networks = list(dict.fromkeys(row.network for row in rows))
    kinds = list(dict.fromkeys(row.xla for row in rows))
    figure, grid = report.panels(len(kinds), len(networks))
    for axes, (is_xla, name) in zip(
        grid.flat, [(k, n) for k in kinds for n in networks]
    ):
        has_rows = any((row.network, row.xla) == (name, is_xla) for row in rows)
        axes.set_visible(has_rows)
        for way in WAYS if has_rows else ():
            mine = sorted(
                (row.window, row.milliseconds)
                for row in rows
                if (row.network, row.xla, row.way) == (name, is_xla, way)
            )
            axes.plot(*zip(*mine), label=way, **report.STYLES[way])
        windows = sorted({row.window for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(windows, [str(w) for w in windows])
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set(title=f"{name}, {'' if is_xla else 'no '}XLA")
    report.label(
        grid, "micro-batches in a window", "time of a micro-batch (ms)"
    )
    report.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0; 1 where something is slower than `--check` allows, or a target is
        missed and `--targets` is given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="without XLA, where there is both")
    add(
        "--networks",
        nargs="*",
        choices=NETWORKS,
        help="by default what ten minutes are enough for",
    )
    add("--windows", nargs="*", type=int, default=[8], help="micro-batches")
    add("--rounds", type=int, default=3)
    add(
        "--check",
        metavar="FILE",
        help="fail where kaccum is slower than in FILE, beyond the noise",
    )
    add("--targets", action="store_true", help="fail where one is missed")
    add("--csv", metavar="FILE", help="write the rows into FILE")
    add("--plot", metavar="FILE", help="draw the rows into FILE")
    options = parser.parse_args(arguments)
    before = read(options.check) if options.check else []
    print(report.machine())
    print(HEAD)
    rows: list[Row] = []
    for case in cases(options.networks, is_quick=options.quick):
        for row in measure(*case, options.windows, options.rounds):
            rows.append(row)
            print(line(row), flush=True)
    print(f"noise: the same fit twice differs by up to {noise(rows):.0%}")
    if options.csv:
        report.write(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)
    all_missed = missed(rows)
    print("\n".join(["targets missed:", *(all_missed or ["none"])]))
    is_worse = bool(all_missed and options.targets)
    if options.check:
        all_slower = slower(rows, before)
        print("\n".join(["slower:", *(all_slower or ["none"])]))
        is_worse = is_worse or bool(all_slower)
    return 1 if is_worse else 0


if __name__ == "__main__":
    sys.exit(main())
