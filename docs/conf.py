"""How Sphinx builds the documentation."""

import re
import textwrap

project = "kaccum"
copyright = "the kaccum authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = "kaccum"
# Docstrings are written as Keras's: `code` in single backticks.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
nitpicky = True
smartquotes = False


def find_pictures(app, path, parent, content):
    """Pictures of the README, from the folder that includes it."""
    content[0] = content[0].replace(":: benchmarks/", ":: ../benchmarks/")


def fences_to_blocks(app, what, name, obj, options, lines):
    """Turns a docstring's fenced example into one of reStructuredText."""
    text = "\n".join(lines)
    for block in re.findall(r"```python\n.*?```", text, re.DOTALL):
        code = block.removeprefix("```python\n").removesuffix("```")
        directive = ".. code-block:: python\n\n" + textwrap.indent(code, "    ")
        text = text.replace(block, directive)
    lines[:] = text.split("\n")


def setup(app):
    app.connect("include-read", find_pictures)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", fences_to_blocks, priority=100)
