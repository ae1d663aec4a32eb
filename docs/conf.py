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


def from_the_readme(app, path, parent, content):
    """What the README names, from the folder that includes it."""
    text = content[0].replace(":: benchmarks/", ":: ../benchmarks/")
    content[0] = re.sub(r"``docs/([\w-]+)\.rst``", r":doc:`\1`", text)


def fences_to_blocks(app, what, name, obj, options, lines):
    """Turns a docstring's fenced example into one of reStructuredText."""
    text = "\n".join(lines)
    for block in re.findall(r"```python\n.*?```", text, re.DOTALL):
        code = block.removeprefix("```python\n").removesuffix("```")
        directive = ".. code-block:: python\n\n" + textwrap.indent(code, "    ")
        text = text.replace(block, directive)
    lines[:] = text.split("\n")


def setup(app):
    app.connect("include-read", from_the_readme)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", fences_to_blocks, priority=100)
