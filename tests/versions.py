"""Runs the tests on the oldest, the newest and the nightly versions.

    python -m tests.versions
    python -m tests.versions oldest --backends torch jax

On each backend, in a fresh environment that has no other backend; it takes
long and prints a table. The oldest are the lower bounds in setup.cfg, on the
oldest Python that they run on (if `PATH` has that, as in `python3.10`).
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = configparser.ConfigParser()
CONFIG.read(Path(__file__).parent.parent / "setup.cfg")
EXTRAS = CONFIG["options.extras_require"]
BACKENDS = ("tensorflow", "jax", "torch")
CASES = ("oldest", "newest", "nightly")
ROW = "{:8} {:11} {:8} {:8} {:12} {:22} {}"


def needed(backend):
    """What kaccum and its tests require on a backend, as setup.cfg has it."""
    tools = EXTRAS["test"].split()
    required = [
        *CONFIG["options"]["install_requires"].split(),
        *(each for each in tools if not each.startswith("tensorflow")),
        # These say it more strictly.
        *EXTRAS[backend].split(),
    ]
    return list({each.split(">=")[0]: each for each in required}.values())


def oldest_python(backend):
    """The oldest Python that kaccum claims and JAX has, or this one."""
    oldest = CONFIG["options"]["python_requires"].removeprefix(">=")
    name = "python" + ("3.11" if backend == "jax" else oldest)
    found = shutil.which(name)
    if (
        found is None
        or subprocess.run([found, "-c", ""], capture_output=True).returncode
    ):
        # A version manager may have a name for what is not chosen.
        return sys.executable
    return found


def steps_of(case, backend):
    """Which Python runs a case, and what its `pip` is told, in order."""
    packages = needed(backend)
    if case == "oldest":
        packages = [each.replace(">=", "==") for each in packages]
        return oldest_python(backend), [["install", ".", *packages]]
    upgrade = ["--upgrade", "--upgrade-strategy=eager"]
    steps = [["install", *upgrade, ".", *packages]]
    if case == "nightly":
        # It brings the package `keras` too, so it takes the place of that.
        steps.append(["uninstall", "--yes", "keras"])
        steps.append(["install", "--pre", "keras-nightly"])
    return sys.executable, steps


def run(case, backend):
    """Installs and tests one case; returns its row and whether all passed."""
    python, steps = steps_of(case, backend)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        for step in steps:
            done = _capture(backend, python, "-m", "pip", *step)
            if done.returncode:
                error = re.findall("^ERROR: (.*)", done.stderr, re.MULTILINE)
                last = (error or ["pip failed"])[-1]
                return ROW.format(case, backend, *"----", last), False
        start = time.monotonic()
        tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
        done = _capture(backend, python, *tests)
        minutes = (time.monotonic() - start) / 60
        versions = _versions(backend, python)
    result = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        print(done.stdout)
    result = re.sub(r" in .*", "", result) + f" in {minutes:.0f} minutes"
    return ROW.format(case, backend, *versions, result), done.returncode == 0


def _versions(backend, python):
    program = (
        f"import platform, numpy, keras, {backend}\n"
        "print(platform.python_version(), numpy.__version__,"
        f" {backend}.__version__, keras.__version__)"
    )
    return _capture(backend, python, "-c", program).stdout.split()


def _capture(backend, *command):
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # As many tests at a time as cores; each of PyTorch's takes one.
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, capture_output=True, text=True, env=environment
    )


def main():
    """Prints a line for each case; ends with an error unless all passed."""
    parser = argparse.ArgumentParser(
        description="Tests kaccum on other versions of what it needs."
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS
    )
    options = parser.parse_args()
    cases = options.cases or CASES
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        parser.error(f"no such case: {unknown[0]}")
    titles = ("case", "backend", "Python", "NumPy", "its version", "Keras")
    print(ROW.format(*titles, "tests"), flush=True)
    have_passed = []
    for case in cases:
        for backend in options.backends:
            row, has_passed = run(case, backend)
            print(row, flush=True)
            have_passed.append(has_passed)
    sys.exit(not all(have_passed))


if __name__ == "__main__":
    main()
