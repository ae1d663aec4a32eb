"""How Sphinx builds the documentation."""

import pathlib
import re
import shutil
import textwrap

import kaccum

HERE = pathlib.Path(__file__).parent
project = "kaccum"
copyright = "the kaccum authors"
version = release = kaccum.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"kaccum {version}"
html_static_path = ["_static"]
html_css_files = ["kaccum.css"]
# A notebook is shown with the outputs that it is stored with.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
# The button copies what is typed, and no output.
copybutton_selector = ", ".join(
    f"div.highlight-{kind} pre" for kind in ("python", "ipython3", "default")
)
# Docstrings are written as Keras's: `code` in single backticks.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
nitpicky = True
# TensorFlow has no pages that Sphinx could link to.
nitpick_ignore = [("py:exc", "tf.errors.InvalidArgumentError")]
smartquotes = False


def from_the_readme(app, path, parent, content):
    """What the README names, from the folder that includes it."""
    text = content[0].replace(":: benchmarks/", ":: ../benchmarks/")
    text = re.sub(r"<docs/([\w-]+)\.rst>`__", r"<\1>`", text)
    text = re.sub(r"<(notebooks/[\w-]+)\.ipynb>`__", r"<\1>`", text)
    content[0] = re.sub(r"`([^`<]+<[\w/-]+>`)", r":doc:`\1", text)


def fences_to_blocks(app, what, name, obj, options, lines):
    """Turns a docstring's fenced example into one of reStructuredText."""
    text = "\n".join(lines)
    for block in re.findall(r"```python\n.*?```", text, re.DOTALL):
        code = block.removeprefix("```python\n").removesuffix("```")
        directive = ".. code-block:: python\n\n" + textwrap.indent(code, "    ")
        text = text.replace(block, directive)
    lines[:] = text.split("\n")


def bring_notebooks(app):
    """Copies them to where Sphinx looks for pages."""
    shutil.copytree(
        HERE.parent / "notebooks",
        HERE / "notebooks",
        ignore=shutil.ignore_patterns(".*"),
        dirs_exist_ok=True,
    )


def setup(app):
    app.connect("builder-inited", bring_notebooks)
    app.connect("include-read", from_the_readme)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", fences_to_blocks, priority=100)
