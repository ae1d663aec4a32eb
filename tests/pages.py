"""The pages that users read, and the programs on them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text()
PAGES = {
    path.stem: path.read_text()
    for path in [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]
}


def examples_of(page):
    """The programs of a page, each with the comment before it or ''."""
    return re.findall(
        r"(?:\.\. (\w[\w ]*)\n)?\.\. code-block:: python\n\n"
        r"((?:    .*\n|\n)+)",
        PAGES[page],
    )
