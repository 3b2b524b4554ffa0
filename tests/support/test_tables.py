"""Tables have the same content in every format."""

from dstill.support.tables import latex, markdown

LINES = [["", "accuracy %"], ["a_b & c", "40.0 ± 1.0"], ["x | y", "–"]]


def test_markdown_keeps_its_columns() -> None:
    assert markdown(LINES) == "|  | accuracy % |\n| --- | ---: |\n| a_b & c | 40.0 ± 1.0 |\n| x \\| y | – |\n"


def test_latex_escapes_what_it_would_take_for_commands() -> None:
    assert latex(LINES).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r" & accuracy \% \\",
        r"\midrule",
        r"a\_b \& c & 40.0 $\pm$ 1.0 \\",
        r"x | y & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_prints_every_letter_as_it_is() -> None:
    line = latex([["", "a"], [r"C:\x{1}^2~", "#$"]]).splitlines()[4]
    assert line == r"C:\textbackslash{}x\{1\}\textasciicircum{}2\textasciitilde{} & \#\$ \\"
