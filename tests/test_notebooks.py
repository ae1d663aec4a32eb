"""The notebooks run, their checks hold, and what they show is stored."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.backends import only_on
from tests.pages import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.stem
)


@pytest.mark.notebooks
@only_on("tensorflow", reason="they show TensorFlow's loops and Keras's own")
@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """In a folder of its own; a check in it that fails is an error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()


@each_notebook
def test_a_notebook_is_stored_with_what_it_shows(path):
    """Run once from top to bottom, with pictures, and without an error."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
    }
    assert all(output.get("name") != "stderr" for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 2 or path.stem == "03-property-tests"
    checks = "\n".join(cell.source for cell in cells).count("\nassert ")
    assert checks >= 3


def test_there_are_notebooks():
    """And the README names each."""
    names = [path.stem for path in NOTEBOOKS]
    assert len(names) == 4
    readme = (ROOT / "README.rst").read_text()
    assert [name for name in names if f"``{name}``" not in readme] == []
