"""What is of one backend stays there."""

import ast
import pathlib
import re
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
def test_a_backend_is_the_only_place_of_its_framework(path):
    """Everything else is on Keras, and knows no framework by its name."""
    allowed = FRAMEWORKS & {path.parent.name, path.stem}
    assert imported(path) & FRAMEWORKS <= allowed


# Each knows those before it only; files of the last one stand by themselves.
ROOMS = ["backends", "patches", "callers", "checks", "sums", "step", "fit", ""]


def room_of(parts):
    """The number of the room that a module is in."""
    return ROOMS.index(parts[0]) if parts[0] in ROOMS else len(ROOMS) - 1


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem
)
def test_arrows_run_one_way(path):
    """No room knows one to its left, hidden imports included."""
    mine = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    text = path.read_text()
    # The one import by name, which chooses the framework.
    hidden = re.findall(r"import_module\((.*)\)|__import__", text)
    chooses = path.relative_to(PACKAGE).as_posix() == "backends/__init__.py"
    assert hidden == (['f"kaccum.backends.{name}"'] if chooses else [])
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module == "kaccum":
                modules = [f"kaccum.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
        for module in modules:
            top, *parts = module.split(".")
            if top == "kaccum" and parts:
                assert room_of(parts) <= mine, f"{path} imports {module}"


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
    assert f"kaccum.backends.{BACKEND}" in done.stdout.split()
