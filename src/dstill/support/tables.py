"""Tables as Markdown and LaTeX. The first line of a table is its heading."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Lines = Sequence[Sequence[str]]

_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
)


def markdown(lines: Lines, left: Collection[str] = ("",)) -> str:
    """A table in Markdown.

    Args:
        lines: the heading and the rows, as cells of text.
        left: headings of the columns that are aligned to the left; the others are aligned to the right.

    Example:
        >>> print(markdown([["", "accuracy"], ["ast", "65.1"]]), end="")
        |  | accuracy |
        | --- | ---: |
        | ast | 65.1 |
    """
    heading, *rows = lines
    ruled = [heading, ["---" if name in left else "---:" for name in heading], *rows]
    plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in ruled]
    return "\n".join("| " + " | ".join(line) + " |" for line in plain) + "\n"


def bulleted(sentences: Sequence[str]) -> str:
    """A list in Markdown, to follow a table; empty if there is nothing to say.

    Example:
        >>> bulleted(["dm is ahead"])
        '\\n- dm is ahead\\n'
    """
    return "".join(f"\n- {' '.join(one.split())}" for one in sentences) + "\n" if sentences else ""


def latex(lines: Lines, left: Collection[str] = ("",)) -> str:
    """A table as a LaTeX `tabular` with the rules of booktabs; the arguments are those of `markdown`."""
    columns = "".join("l" if name in left else "r" for name in lines[0])
    heading, *rows = [" & ".join(" ".join(cell.split()).translate(_LATEX) for cell in line) + r" \\" for line in lines]
    ruled = [r"\toprule", heading, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *ruled, r"\end{tabular}"]) + "\n"
