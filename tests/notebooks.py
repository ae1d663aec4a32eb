"""Runs the notebooks that changed, or whose package did, and stores them.

    python -m tests.notebooks            # runs those that are not as stored
    python -m tests.notebooks --all      # runs all of them
    python -m tests.notebooks --store    # and keeps what they show

A notebook is stored with a digest of what it ran, its own programs and
kaccum's:
as long as that is right, it would show the same again.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile

from tests.pages import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 600


def read(path):
    """A stored notebook."""
    import nbformat

    return nbformat.read(path, as_version=4)


def programs(notebook):
    """The cells that are run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Of the notebook's programs and of the package."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "kaccum").rglob("*.py")):
        found.update(path.read_bytes())
    for cell in programs(notebook):
        found.update(cell.source.encode())
    return found.hexdigest()


def is_as_stored(notebook):
    """Whether what it shows is what this package would show."""
    return notebook.metadata.get("kaccum_digest") == digest(notebook)


def run(notebook):
    """Executes it in a folder of its own; a check that fails is an error."""
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()
    drop_logs(notebook)
    notebook.metadata["kaccum_digest"] = digest(notebook)


def drop_logs(notebook):
    """Drops what TensorFlow's own logging writes to the error stream."""
    is_log = re.compile(r"WARNING: All log messages before absl|[IWE]0000 |$")
    for cell in programs(notebook):
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr"
            or not all(map(is_log.match, output.text.splitlines()))
        ]


def main(arguments=None):
    """Prints a line for each notebook."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="also as stored")
    parser.add_argument("--store", action="store_true", help="keep outputs")
    options = parser.parse_args(arguments)
    for path in NOTEBOOKS:
        notebook = read(path)
        if is_as_stored(notebook) and not options.all:
            print(f"{path.stem}: as stored")
            continue
        run(notebook)
        print(f"{path.stem}: ran", flush=True)
        if options.store:
            import nbformat

            nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
