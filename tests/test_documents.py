"""What the README and the docstrings say is what happens."""

import contextlib
import inspect
import io
import json
import os
import pydoc
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from kaccum import (
    GradientAccumulationCallback,
    GradientAccumulator,
    __main__,
    accumulate,
)
from kaccum.backends import backend
from kaccum.testing import assert_same_fit
from tests.backends import BACKEND, needs_demo, needs_graphs, only_on
from tests.pages import PAGES, README, ROOT, examples_of
from tests.profiles import at_night, nightly

# Marks of examples that do not run here; `test_distribution` runs the first,
# `test_processes` the second.
OTHERS = ("on two machines", "in processes", "other library")
BEFORE = """
import keras
import numpy as np
from hypothesis import given
from kaccum import GradientAccumulationCallback, accumulate
from kaccum.testing import assert_same_fit, runs
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

def build_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])

x, y = np.ones((64, 4)), np.ones((64, 1))
batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
model = build_model()
model.compile("adam", "mse")
"""


def run(program):
    """What a program prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "example", "exec"), {})
    return printed.getvalue().strip()


def test_the_readmes_program_prints_what_it_says():
    """The first program of the README, and the output below it."""
    blocks = re.findall(r"\.\. code-block:: \w+\n\n((?:    .*\n|\n)+)", README)
    program, output = (textwrap.dedent(b) for b in blocks[1:3])
    assert run(program) == output.strip()


@pytest.mark.parametrize("number", range(len(examples_of("README"))))
def test_each_program_of_the_readme_runs_by_itself(number):
    """As it is pasted, with nothing before it."""
    mark, program = examples_of("README")[number]
    assert not mark
    run(textwrap.dedent(program))


def test_the_readmes_links_lead_somewhere():
    """To the pages and the notebooks of this repository."""
    links = re.findall(r"<([\w./-]+)>`__", README)
    assert len(links) >= 20
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if examples_of(p)])
def test_every_example_of_a_page_runs(page, tmp_path):
    """One after the other, but those of another backend or library."""
    program = BEFORE
    for mark, example in examples_of(page):
        assert mark in {"", *OTHERS, "on tensorflow", "on jax"}, mark
        if mark in ("", f"on {BACKEND}"):
            program += textwrap.dedent(example)
        elif mark == "other library":
            compile(textwrap.dedent(example), page, "exec")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            # On so few examples.
            "-W",
            "ignore:`steps` must not be more than the batches:UserWarning",
            # As in `setup.cfg`.
            "-W",
            "ignore:Explicitly requested dtype float64 requested:UserWarning",
            "-W",
            "ignore:Explicitly requested dtype int64 requested:UserWarning",
            "-c",
            program,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=needs_graphs)])
def test_a_resumed_run_is_as_if_it_had_not_stopped(number):
    """In the middle of an epoch, by an index or a checkpoint of `tf.data`."""
    programs = [textwrap.dedent(text) for _, text in examples_of("resuming")]
    program = "\n".join(programs[:number])
    same = "largest difference: 0.0"
    assert set(run(program).splitlines()[1:]) == {same}
    # Without the seeds it is another run, so this test can fail.
    broken = re.sub(r"variable\.assign\(.*\)", "pass", program)
    assert run(broken).splitlines()[-1] != same


def test_moving_keeps_the_state_of_the_optimizer(tmp_path, monkeypatch):
    """A model that Keras's own trained goes on as one of large batches."""
    monkeypatch.chdir(tmp_path)
    own, after = (
        next(text for _, text in examples_of("moving") if words in text)
        for words in ("gradient_accumulation_steps=", "load_model")
    )
    begin = "\nkeras.utils.set_random_seed(0)\nmodel = build_model()\n"
    large = """
model.compile(keras.optimizers.Adam(1e-3), "mse")
for _ in range(2):
    model.fit(x, y, batch_size=32)
"""
    models = []
    for program in (textwrap.dedent(own + after), large):
        names = {}
        exec(BEFORE + begin + program, names)
        models.append(names["model"])
    assert [int(model.optimizer.iterations) for model in models] == [4, 4]
    for mine, other in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


@pytest.mark.parametrize(
    "documented",
    [
        GradientAccumulationCallback,
        pytest.param(GradientAccumulator, marks=needs_graphs),
        accumulate,
        assert_same_fit,
    ],
    ids=lambda each: each.__name__,
)
def test_the_docstrings_example_prints_what_it_says(documented):
    """The comment behind a `print` is its output."""
    doc = inspect.getdoc(documented)
    program = re.search(r"```python\n(.*?)```", doc, re.S).group(1)
    expected = re.search(r"print\(.*\)  # (\S+):", program).group(1)
    assert run(program).splitlines()[-1] == expected


def test_help_on_the_callback_fits_two_screens():
    """What is kaccum's of it: Keras's own methods come after."""
    text = pydoc.plain(pydoc.render_doc(GradientAccumulationCallback))
    ours, _ = text.split("Methods inherited")
    assert len(ours.splitlines()) <= 2 * 60


def test_every_test_that_a_page_names_exists():
    """Each law names its test."""
    names = re.findall(r"``(test_\w+)``", "".join(PAGES.values()))
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert len(names) >= 35
    methods = {"test_step", "test_function"}
    names = [name for name in names if name not in methods]
    assert [n for n in names if f"def {n}(" not in tests] == []


@needs_demo
def test_the_main_job_finds_the_large_batch_run(tmp_path, capsys):
    """`python -m kaccum` exits with 0 and draws."""
    path = tmp_path / "plot.png"
    options = ["--epochs", "1", "--batch-size", "256", "--plot", str(path)]
    assert __main__.main(options) == 0
    assert "kaccum's run is the large-batch run" in capsys.readouterr().out
    assert path.stat().st_size > 1000


@needs_demo
def test_the_main_job_reports(tmp_path, capsys):
    """What came of each way to ask, for machines where nobody looks."""
    path = tmp_path / "report.json"
    options = ["--epochs", "1", "--batch-size", "256", "--device", "cpu:0"]
    assert __main__.main([*options, "--report", str(path)]) == 0
    report = json.loads(path.read_text())
    assert set(report["versions"]) == {"keras", "numpy", BACKEND}
    runs = report["runs"]
    large, *ours, own = runs
    assert (large, own) == ("large batch", "Keras's own")
    assert ours == ["steps", "micro_batch_size=32", "micro_batch_size='auto'"]
    for name in ours:
        assert runs[name]["is_the_large_batch"]
        assert runs[name]["difference"] < report["tolerance"]
        assert runs[name]["updates"] == runs[large]["updates"] == 8
    sizes = [runs[name]["micro_batch_size"] for name in ours]
    assert sizes == [None, 32, 256]
    assert not runs[own]["is_the_large_batch"]


@needs_demo
def test_running_out_of_memory_needs_a_gpu(capsys):
    """The system ends a process that takes all of the processor's."""
    if not backend().device_name().startswith("CPU"):
        pytest.skip("There is one.")
    assert __main__.main(["--auto-oom"]) == 2
    assert capsys.readouterr().err == (
        "`--auto-oom` needs a GPU, whose memory can run out without harm. "
        "Received: CPU (not run on a GPU). Leave it out.\n"
    )


SHORT_OF_MEMORY = """
import os, resource, sys
from kaccum import __main__
from kaccum.backends import backend

options = ["--epochs", "1"]
__main__.main(options)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + 700 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
# As of a device that has its own.
type(backend()).peak_memory = lambda self: 700 * 2**20
sys.exit(__main__.main([*options, "--auto-oom", "--report", sys.argv[1]]))
"""


@needs_demo
@only_on("jax", "torch", reason="it aborts where the processor's memory ends")
@pytest.mark.skipif(sys.platform != "linux", reason="no limit to set")
def test_the_main_job_has_memory_run_out(tmp_path):
    """Memory that really does, in a process of its own."""
    path = tmp_path / "report.json"
    ran = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())["auto_oom"]
    assert found["said"] and found["updates"] == 2
    assert 1 <= found["micro_batch_size"] < 64
    assert found["difference"] < 1e-5 and found["is_the_large_batch"]
    assert "'auto' found micro-batches of" in ran.stdout


def test_the_main_job_names_the_extra_that_it_needs(monkeypatch, capsys):
    """Where scikit-learn is not installed."""
    monkeypatch.setattr(__main__.importlib.util, "find_spec", lambda name: None)
    assert __main__.main(["--plot", "digits.png"]) == 2
    assert capsys.readouterr().err == (
        "The demo needs scikit-learn and matplotlib, which `pip install "
        "kaccum[demo]` installs.\n"
    )


@needs_demo
@pytest.mark.parametrize("size", ["auto", *at_night(["100"])])
def test_the_main_job_cuts_large_batches(size, capsys):
    """`--micro-batch-size` is the other way to ask."""
    options = ["--epochs", "1", "--batch-size", "256"]
    assert __main__.main([*options, "--micro-batch-size", size]) == 0
    printed = capsys.readouterr().out
    assert "kaccum's run is the large-batch run" in printed
    assert ("fit in memory" in printed) == (size == "auto")


@needs_demo
def test_the_main_job_begins_with_a_title(capsys):
    """Apart from what a framework writes above it of how it started."""
    assert __main__.main(["--epochs", "1"]) == 0
    empty, title, line, device, *_ = capsys.readouterr().out.splitlines()
    assert (empty, title) == ("", __main__.TITLE)
    assert line == "=" * len(title) and device.startswith("device: ")


@nightly
@needs_demo
@only_on("tensorflow", "jax", reason="one device only")
def test_the_main_job_has_replicas():
    """`--replicas`, where a program has made no strategy yet."""
    command = [sys.executable, "-m", "kaccum", "--epochs", "1", "--replicas"]
    done = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert "kaccum: on 2 replicas" in done.stdout
    assert "kaccum's run is the large-batch run" in done.stdout


@needs_demo
# Windows that are twice as long make half the updates.
@pytest.mark.filterwarnings("ignore:A schedule of the learning rate must count")
def test_the_main_job_finds_another_run(monkeypatch, capsys):
    """`python -m kaccum` exits with 1 where the runs differ."""
    monkeypatch.setattr(
        __main__,
        "GradientAccumulationCallback",
        lambda steps: GradientAccumulationCallback(2 * steps),
    )
    assert __main__.main(["--epochs", "1", "--batch-size", "256"]) == 1
    assert "kaccum's run is NOT the" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps must be >= 1"),
        (["--micro-batch-size", "0"], "--micro-batch-size: invalid"),
        (["--micro-batch-size", "Auto"], "--micro-batch-size: invalid"),
        (["--steps", "3"], "--batch-size must be a multiple of --steps"),
        (["--replicas", "3"], "--replicas must divide a micro-batch"),
    ],
    ids=["none", "no-size", "not-auto", "indivisible", "replicas"],
)
def test_the_main_job_checks_its_options(arguments, message, capsys):
    """A bad option is named."""
    with pytest.raises(SystemExit):
        __main__.main(arguments)
    assert message in capsys.readouterr().err
