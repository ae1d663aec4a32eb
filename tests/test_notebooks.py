"""The notebooks run, their checks hold, and what they show is stored."""

import pytest

from tests import notebooks
from tests.backends import only_on
from tests.pages import ROOT
from tests.profiles import nightly

pytest.importorskip("nbformat", reason="notebooks are read by nbformat")
each_notebook = pytest.mark.parametrize(
    "path", notebooks.NOTEBOOKS, ids=lambda path: path.stem
)


@nightly
@only_on("tensorflow", reason="they show TensorFlow's loops and Keras's own")
@each_notebook
def test_a_notebook_runs(path):
    """A check in it that fails is an error."""
    notebooks.run(notebooks.read(path))


@each_notebook
def test_a_notebook_is_stored_with_what_it_shows(path):
    """Run once from top to bottom, with pictures, and without an error."""
    cells = notebooks.programs(notebooks.read(path))
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
    }
    assert all(output.get("name") != "stderr" for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures >= 2
    checks = "\n".join(cell.source for cell in cells).count("\nassert ")
    assert checks >= 3


@each_notebook
def test_a_notebook_soon_has_a_picture(path):
    """Nobody reads a hundred lines before the first one."""
    lines = 0
    for cell in notebooks.programs(notebooks.read(path)):
        lines += len(cell.source.splitlines())
        if "plt.show()" in cell.source:
            break
    assert lines < 100


@each_notebook
def test_pictures_have_titles(path):
    """Of what is drawn by axes, or of the figure."""
    for cell in notebooks.programs(notebooks.read(path)):
        if "plt.show()" in cell.source:
            assert "title" in cell.source


def test_a_notebook_that_changed_is_not_as_stored(monkeypatch, tmp_path):
    """Its own programs, or those of the package."""
    notebook = notebooks.read(notebooks.NOTEBOOKS[0])
    notebook.metadata["kaccum_digest"] = notebooks.digest(notebook)
    assert notebooks.is_as_stored(notebook)
    cell = notebooks.programs(notebook)[-1]
    before, cell.source = cell.source, cell.source + "\n"
    assert not notebooks.is_as_stored(notebook)
    cell.source = before
    (tmp_path / "kaccum").mkdir()
    (tmp_path / "kaccum" / "other.py").write_text("")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    assert not notebooks.is_as_stored(notebook)


def test_there_are_notebooks():
    """And the README names each."""
    names = [path.stem for path in notebooks.NOTEBOOKS]
    assert len(names) == 7
    readme = (ROOT / "README.rst").read_text()
    links = [f"<notebooks/{name}.ipynb>`__" for name in names]
    assert [link for link in links if link not in readme] == []
