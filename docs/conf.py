"""Sphinx's configuration; `.ci/docs` builds the pages and checks them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import mrelease

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
CHANGES = (HERE.parent / "CHANGELOG.md").read_text()

project = "mrelease"
version = release = mrelease.__version__
# Of the last release: the man page is kept in the repository, so it may not change with
# the day on which it is made.
today = "".join(re.findall(r"^## [\d.]+ - (\S+)$", CHANGES, re.M)[:1])

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["performance/*"]  # parts of a page
suppress_warnings = ["epub.unknown_project_files"]

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 72

# The examples kill real processes; those of a cgroup need one that can be made.
doctest_global_setup = f"""
import sys
sys.path.insert(0, {str(HERE.parent / "tests")!r})
import cgroups
no_cgroup = cgroups.why_no_cgroup2()
"""

html_theme = "furo"
html_title = f"mrelease {release}"
html_static_path = ["_static"]
html_css_files = ["mrelease.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

man_pages: list[tuple[str, str, str, list[str], int]] = [
    ("command", "mrelease", "kill processes and get their memory back at once", [], 1)
]

# The beginning of "name: what it is" in a docstring.
_FIELD = re.compile(r"(\w+): ")


def _as_fields(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Make fields of what a docstring says of each parameter, one a line."""
    kind = "ivar" if name == "mrelease.KillResult" else "param"
    inside, before = False, ""
    for number, line in enumerate(lines):
        found = _FIELD.match(line)
        inside = bool(line) and (inside or bool(found and not before))
        before = line
        if inside and found:
            line = f":{kind} {found[1]}: {line[found.end() :]}"
        # A name that ends so is no link to something.
        lines[number] = re.sub(r"_(?=\s|$)", r"\\_", line)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _as_fields)
