"""Sphinx configuration. Build with `sphinx-build -W -b html docs docs/_build/html`."""

from __future__ import annotations

import re
from typing import Any

from dstill.version import __version__

project = "dstill"
author = "The dstill authors"
project_copyright = "The dstill authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"dstill {version}"
html_show_sphinx = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns):$")
_MARKUP = re.compile(r"[*|\\]|_(?=\W|$)")


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Reads docstrings as they are written: `x` is code, an indented formula is literal, and * and | mean themselves."""
    out: list[str] = []
    section, doctest, literal = "", False, False
    for line in lines:
        found = _SECTION.match(line)
        section = found[1] if found else section
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        formula = not section and line.startswith("    ")
        if formula and not literal:
            out += ["::", ""]
        literal = formula or (literal and not line.strip())
        if found or doctest or formula:
            out.append(line)
            continue
        parts = line.split("`")
        text = [_MARKUP.sub(lambda m: "\\" + m[0], part) for part in parts[::2]]
        code = [f"``{part}``" for part in parts[1::2]]
        out.append("".join(a + b for a, b in zip(text, [*code, ""], strict=True)))
    if out and what in ("attribute", "property"):
        out[0] = out[0].replace(": ", " - ", 1)  # napoleon would take what stands before the colon for a type
    lines[:] = out


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon, which has 500
