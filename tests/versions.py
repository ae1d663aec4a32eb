"""Runs the tests on the oldest, the newest and the nightly versions.

    python -m tests.versions

Each in a fresh environment; takes minutes and prints a table. The oldest are
the lower bounds in setup.cfg, on the oldest Python it claims (if `PATH` has
that, as in `python3.10`).
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
ROW = "{:8} {:8} {:8} {:10} {:22} {}"


def oldest():
    """The lower bounds of what kaccum requires, as pip writes them."""
    requirements = CONFIG["options"]["install_requires"].split()
    return [each.replace(">=", "==") for each in requirements]


def oldest_python():
    """The oldest Python that kaccum claims, or this one."""
    name = "python" + CONFIG["options"]["python_requires"].removeprefix(">=")
    return shutil.which(name) or sys.executable


# Which Python, and what its `pip` is told.
CASES = {
    "oldest": (oldest_python(), ["install", ".[test]", *oldest()]),
    "newest": (
        sys.executable,
        ["install", "--upgrade-strategy=eager", "--upgrade", ".[test]"],
    ),
    # It brings the package `keras` too, so it goes over the released one.
    "nightly": (
        sys.executable,
        ["install", ".[test]"],
        ["uninstall", "--yes", "keras"],
        ["install", "--pre", "keras-nightly"],
    ),
}


def run(name):
    """Installs and tests one case; returns its row and whether all passed."""
    python, *steps = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        for step in steps:
            done = _capture(python, "-m", "pip", *step)
            if done.returncode:
                error = re.findall("^ERROR: (.*)", done.stderr, re.MULTILINE)
                last = (error or ["pip failed"])[-1]
                return ROW.format(name, "-", "-", "-", "-", last), False
        start = time.monotonic()
        done = _capture(python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        minutes = (time.monotonic() - start) / 60
        versions = _versions(python)
    result = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        print(done.stdout)
    result = re.sub(r" in .*", "", result) + f" in {minutes:.0f} minutes"
    return ROW.format(name, *versions, result), done.returncode == 0


def _versions(python):
    program = (
        "import platform, numpy, tensorflow, keras\n"
        "print(platform.python_version(), numpy.__version__,"
        " tensorflow.__version__, keras.__version__)"
    )
    return _capture(python, "-c", program).stdout.split()


def _capture(*command):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
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
    names = parser.parse_args().cases or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no such case: {unknown[0]}")
    titles = ("case", "Python", "NumPy", "TensorFlow", "Keras", "tests")
    print(ROW.format(*titles), flush=True)
    have_passed = []
    for name in names:
        row, has_passed = run(name)
        print(row, flush=True)
        have_passed.append(has_passed)
    sys.exit(not all(have_passed))


if __name__ == "__main__":
    main()
