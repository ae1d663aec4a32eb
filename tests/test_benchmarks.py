"""The benchmarks run, and say when a target is missed."""

import csv

import pytest

from benchmarks import gradients, growth, memory, speed, whole_batch
from benchmarks.networks import Network, many_variables, normal
from benchmarks.ways import (
    AGAIN,
    BARE,
    CUT,
    KINDS,
    LARGE,
    PLAIN,
    STEPS,
    WAYS,
    WHOLE_CUT,
    ratio,
)
from tests.backends import BACKEND, only_on
from tests.profiles import is_nightly, nightly

pytest.importorskip("matplotlib", reason="benchmarks draw")

TINY = Network(lambda: many_variables(4), normal(16), 2, 32)


def test_ratios_are_of_pairs():
    """The median of ratios, not the ratio of medians."""
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
    assert ratio([1.0, 4.0, 30.0], [1.0, 2.0, 3.0]) == 2.0
    assert ratio([1.0, 4.0, 9.0], [2.0, 2.0, 9.0]) == 1.0


def test_what_gradients_cost_is_measured(monkeypatch, tmp_path, capsys):
    """With them and without them, and without them again."""
    monkeypatch.setattr(gradients, "NETWORKS", {"tiny": TINY})
    path = tmp_path / "rows.csv"
    options = ["--quick", "--rounds", "1", "--networks", "tiny"]
    assert gradients.main([*options, "--csv", str(path)]) == 0
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert all(float(row[name]) > 0 for name in ("with_it", "alike"))
    assert "with it" in capsys.readouterr().out


def test_speed_measures_every_way(monkeypatch, tmp_path, capsys):
    """A row for each way: none is traced again in a second fit."""
    monkeypatch.setattr(speed, "NETWORKS", {"tiny": TINY})
    files = [str(tmp_path / name) for name in ("rows.csv", "plot.png")]
    # Nothing of what takes no time is a target.
    monkeypatch.setattr(speed, "TO_PLAIN", {"tiny": 1e9})
    options = ["--rounds", "1", "--networks", "tiny", "--targets"]
    options += ["--csv", files[0], "--plot", files[1]]
    if is_nightly():
        options += ["--windows", "8", "2", "32"]
    else:
        options.append("--quick")
    assert speed.main(options) == 0
    with open(files[0]) as file:
        rows = list(csv.DictReader(file))
    cases = [(row["xla"], row["window"], row["way"]) for row in rows]
    assert sorted(cases) == sorted(
        (xla, window, way)
        for xla in map(str, KINDS[BACKEND][: None if is_nightly() else 1])
        for window in (("2", "8", "32") if is_nightly() else ("8",))
        for way in (*WAYS, AGAIN)
    )
    for row in rows:
        assert float(row["milliseconds"]) > 0
        assert int(row["traces"]) >= (row["way"] != AGAIN)
        # Where nothing is compiled, each step is a trace.
        if BACKEND != "torch" and row["way"] in (PLAIN, STEPS, BARE):
            assert int(row["later_traces"]) == 0
        if row["way"] == PLAIN:
            assert float(row["to_plain"]) == 1.0
    printed = capsys.readouterr().out
    assert "targets missed:\nnone" in printed
    assert "noise: the same fit twice differs by up to" in printed


CASE = "tiny, no XLA, window of 8, steps: 1.10 of a plain fit"
SLOWER = f"{CASE}, 1.00 before"


def test_what_compiles_for_minutes_is_measured_where_it_is_asked_for():
    """By default there are the others; by name there is each in each mode."""
    kinds = KINDS[BACKEND]
    default = list(speed.cases(None))
    assert not {"ResNet50", "encoder"} & {name for name, _ in default}
    slow = ("200 variables", True) in default
    assert slow == (kinds == (True,))
    for name in speed.NETWORKS:
        asked = list(speed.cases([name]))
        assert asked == [(name, is_xla) for is_xla in kinds]
        assert list(speed.cases([name], is_quick=True)) == asked[:1]


def measured(ratio, again, **others):
    """Rows of one case: kaccum's, and the plain fit's second."""
    ratios = {PLAIN: 1.0, STEPS: ratio, BARE: 1.0, AGAIN: again}
    rows = [
        speed.Row("tiny", False, 8, way, 1.0, *[ratio] * 4, 1.0, 1, 0)
        for way, ratio in ratios.items()
    ]
    rows[1] = rows[1]._replace(**others)
    return rows


@pytest.mark.parametrize(
    "before, now, expected",
    [
        (measured(1.0, 1.0), measured(1.1, 1.0), SLOWER),
        # What may be noise, of either run.
        (measured(1.0, 1.0), measured(1.04, 1.0), None),
        (measured(1.0, 1.0), measured(1.1, 1.11), None),
        (measured(1.0, 0.89), measured(1.1, 1.0), None),
        (measured(1.0, 1.02), measured(1.1, 0.98), SLOWER),
        (measured(1.0, 1.0), measured(0.9, 1.0), None),
        # What another way's time may be.
        *[
            (measured(1.0, 1.0), measured(1.1, 1.0, **{other: 1.0}), None)
            for other in ("to_plain", "to_keras", "to_bare", "to_large")
        ],
        # What cannot tell.
        (
            measured(1.0, 1.0),
            measured(1.1, 1.3),
            f"{CASE}: too noisy, by 30%, to compare it",
        ),
        (
            [row._replace(backend="another") for row in measured(1.0, 1.0)],
            measured(1.1, 1.0),
            f"{CASE}, and nothing to compare it with",
        ),
    ],
)
def test_speed_tells_of_what_became_slower(
    before, now, expected, monkeypatch, tmp_path, capsys
):
    """`--check` compares with what was stored."""
    monkeypatch.setattr(speed, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(speed, "measure", lambda *case: iter(before))
    path = str(tmp_path / "rows.csv")
    assert speed.main(["--quick", "--csv", path]) == 0
    assert speed.read(path) == before
    assert speed.main(["--quick", "--check", path]) == 0
    monkeypatch.setattr(speed, "measure", lambda *case: iter(now))
    capsys.readouterr()
    # Read before it is written.
    options = ["--quick", "--check", path, "--csv", path]
    assert speed.main(options) == int(bool(expected))
    assert f"slower:\n{expected or 'none'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, to_plain, to_keras, to_bare, bare_to_keras, expected",
    [
        ("tiny", 9.0, 0.95, 1.05, 0.9, []),
        ("tiny", 9.0, 0.94, 1.06, 0.9, ["1.06 of bare loop, target 1.05"]),
        ("tiny", 9.0, 0.97, 1.00, 0.9, ["0.97 of Keras's own, target 0.95"]),
        # The bare loop is no faster.
        ("tiny", 9.0, 0.97, 1.00, 0.97, []),
        ("tiny", 9.0, 1.03, 1.00, 0.97, ["1.03 of Keras's own, target 1.02"]),
        ("tiny, 32 an execution", 1.5, 9.0, 9.0, 0.1, []),
        (
            "tiny, 32 an execution",
            1.6,
            0.1,
            0.1,
            0.1,
            ["1.60 of plain fit, target 1.50"],
        ),
    ],
)
def test_speed_tells_of_a_missed_target(
    name,
    to_plain,
    to_keras,
    to_bare,
    bare_to_keras,
    expected,
    monkeypatch,
    capsys,
):
    """`--targets` fails, for each way of kaccum."""

    def row(way, *ratios):
        return speed.Row(name, False, 8, way, 1.0, *ratios, 1.0, 1.0, 1, 0)

    rows = [
        row(BARE, 1.0, bare_to_keras, 1.0),
        row(PLAIN, 1.0, 9.0, 9.0),
        row(STEPS, to_plain, to_keras, to_bare),
    ]
    monkeypatch.setattr(speed, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(speed, "measure", lambda *case: iter(rows))
    said = [f"{name}, no XLA, steps: {text}" for text in expected]
    assert speed.missed(rows) == said
    assert speed.main(["--quick", "--targets"]) == int(bool(said))
    printed = capsys.readouterr().out
    assert "\n".join(said or ["none"]) in printed
    assert speed.main(["--quick"]) == 0


def rows_of(peaks):
    """Runs of the benchmark of memory that took no process."""

    def row(network, is_xla, way):
        return memory.Row(network, is_xla, way, 100.0, 50.0, peaks[way], 9.0)

    return row


@pytest.mark.parametrize("peak, status", [(209.0, 0), (400.0, 1)])
def test_memory_tells_of_a_missed_target(
    peak, status, monkeypatch, tmp_path, capsys
):
    """`--targets` fails where sums take more than the weights, and a bit."""
    peaks = {PLAIN: 100.0, STEPS: 100.0, CUT: peak}
    monkeypatch.setattr(memory, "in_another_process", rows_of(peaks))
    files = [str(tmp_path / name) for name in ("rows.csv", "plot.png")]
    options = ["--quick", "--csv", files[0], "--plot", files[1]]
    assert memory.main([*options, "--targets"]) == status
    with open(files[0]) as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows[:3]] == [PLAIN, STEPS, CUT]
    printed = capsys.readouterr().out
    assert ("target missed" in printed) == (status == 1)
    assert memory.main(options) == 0


def test_whole_batches_are_measured(monkeypatch, tmp_path):
    """Time of every way, and memory of three, relative to those without."""
    monkeypatch.setattr(whole_batch, "TIMED", {"tiny": TINY})
    monkeypatch.setattr(memory, "FURTHER", {"tiny": TINY})
    peaks = {CUT: 100.0, WHOLE_CUT: 110.0, LARGE: 220.0}
    monkeypatch.setattr(memory, "in_another_process", rows_of(peaks))
    path = str(tmp_path / "rows.csv")
    options = ["--quick", "--rounds", "1", "--networks", "tiny", "--csv", path]
    assert whole_batch.main(options) == 0
    with open(path) as file:
        *timed, cut, whole, large = csv.DictReader(file)
    assert [row["way"] for row in timed] == [*whole_batch.TIMED_WAYS]
    assert float(timed[0]["to_without"]) == float(timed[-1]["to_large"]) == 1
    assert [float(row["to_without"]) for row in (cut, whole)] == [1.0, 1.1]
    assert [float(row["to_large"]) for row in (whole, large)] == [0.5, 1.0]


@nightly
@only_on("tensorflow", "torch", reason="JAX takes 1.2 times the weights")
def test_memory_measures_in_processes(monkeypatch, tmp_path, capsys):
    """The sums are at most what the target allows, and freed afterwards."""
    path = str(tmp_path / "rows.csv")
    options = ["--quick", "--targets", "--networks", memory.HEAVY]
    assert memory.main([*options, "--csv", path]) == 0
    with open(path) as file:
        plain, *ours = csv.DictReader(file)
    for row in ours:
        # Adam keeps twice the weights in both, and the sums are once more.
        more = float(row["after"]) - float(plain["after"])
        assert more < 0.2 * float(row["weights"])
    assert "target missed" not in capsys.readouterr().out


@nightly
@only_on("tensorflow", "torch", reason="it measures what is not XLA's")
def test_growth_measures_every_size(monkeypatch, tmp_path):
    """A row for each way and size."""
    cases = [
        (growth.VARIABLES, 4.0, TINY, 8),
        (growth.WINDOW, 1.0, TINY, 1),
        (growth.WINDOW, 2.0, TINY, 2),
    ]
    monkeypatch.setattr(growth, "cases", lambda is_quick: cases)
    files = [str(tmp_path / name) for name in ("rows.csv", "plot.png")]
    options = ["--csv", files[0], "--plot", files[1], "--rounds", "1"]
    assert growth.main(options) == 0
    with open(files[0]) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cases) * len(growth.GROWTH_WAYS)
    assert {row["way"] for row in rows} == set(growth.GROWTH_WAYS)


@pytest.mark.parametrize("program", [speed, memory, growth, whole_batch])
def test_a_program_explains_itself(program, capsys):
    """`--help`."""
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "--csv FILE" in capsys.readouterr().out
