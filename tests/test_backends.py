"""What is of one backend stays there."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.backends import BACKEND

PACKAGE = pathlib.Path(__file__).parent.parent / "kaccum"
FRAMEWORKS = {"tensorflow", "jax", "torch"}


def imported(path):
    """All parts of the names of modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {part for a in node.names for part in a.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= set(node.module.split("."))
    return names


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem
)
def test_an_engine_is_the_only_place_of_its_framework(path):
    """Everything else is on Keras, and knows no engine by its name."""
    folder = path.parent.name
    allowed = {folder} if folder in FRAMEWORKS else set()
    assert imported(path) & FRAMEWORKS <= allowed


def test_only_the_framework_of_the_backend_is_imported():
    """Whatever else is installed."""
    program = (
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import kaccum\n"
        "kaccum.GradientAccumulationCallback(2)\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    brought = {name.split(".")[0] for name in done.stdout.split()}
    assert brought & FRAMEWORKS <= {BACKEND}
    assert f"kaccum.{BACKEND}" in done.stdout.split()
