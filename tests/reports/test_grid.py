"""One table in three formats; golden/ has Markdown, too."""

import csv
import io

import pytest

from adafrugal.reports.grid import NONE, TWO_SEEDS, Grid, change, difference, number
from adafrugal.reports.statistics import Sample

GRID = Grid(
    ["arm", "loss", "− adamw", "state", "share"],
    [
        ["adamw_x", number(Sample(4.5, 0.25, 3), ".2f"), "", change(2.0, 1.0, "MiB"), "missing"],
        [
            "ρ=0 & 5%",
            number(Sample(-1.0, None, 1), ".2f"),
            difference(Sample(-0.5, 0.1, 3), ".3f"),
            "missing",
            number(Sample(4.5, None, 1), ".1f", "%"),
        ],
        ["one", "missing", difference(Sample(0.5, None, 1), ".1f"), "missing", "missing"],
    ],
)


def test_in_latex_every_special_character_is_escaped():
    text = GRID.latex("50% & more_of it", "page-main")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{50\% \& more\_of it}" in text
    assert r"adamw\_x & 4.50 $\pm$ 0.25 &  & 2.00 MiB $\to$ 1.00 MiB & missing \\" in text
    assert r"$\rho$=0 \& 5\% & -1.00 & $-$0.500 [$-$0.748, $-$0.252] & missing & 4.5\% \\" in text
    assert r"one & missing & +0.5 (1 seed) & missing & missing \\" in text
    assert text.isascii()
    assert Grid(["arm"], [["a$b{c}~^"]]).latex("", "x").count(r"a\$b\{c\}\textasciitilde{}\textasciicircum{} \\") == 1


def test_latex_can_be_referred_to_and_says_what_it_needs_and_what_its_numbers_are():
    text = GRID.latex("Arms", "page-main")
    assert text.startswith("% needs \\usepackage{booktabs}\n\\begin{table}\n")
    assert "\\caption{Arms}\n\\label{tab:page-main}\n" in text
    said = r"$\pm$: standard deviation over seeds (n $-$ 1). [ ]: 95\% interval over seeds, by Student's t."
    assert f"\\end{{tabular}}\n\\par\\smallskip{{\\footnotesize {said}}}\n\\end{{table}}\n" in text


def test_an_interval_of_two_seeds_has_a_caveat_and_without_intervals_nothing_is_said():
    two = Grid(["arm", "difference"], [["a", difference(Sample(0.5, 0.1, 2), ".1f")]])
    assert two.notes() == ["[ ]: 95% interval over seeds, by Student's t.", TWO_SEEDS]
    assert TWO_SEEDS not in GRID.notes()
    one = Grid(["arm", "loss"], [["a", number(Sample(4.5, None, 1), ".1f")]])
    assert one.notes() == [] and "footnotesize" not in one.latex("", "x")


def test_csv_has_unrounded_numbers_in_columns_of_their_own():
    rows = list(csv.reader(io.StringIO(GRID.csv())))
    assert [float(rows[2].pop(4)), float(rows[2].pop(4))] == pytest.approx([-0.748414, -0.251586])
    assert rows == [
        ["arm", "loss", "loss spread", "− adamw", "− adamw low", "− adamw high", "− adamw n",
         "state at the start MiB", "state at the end MiB", "share %", "share spread %"],
        ["adamw_x", "4.5", "0.25", "", "", "", "", "2.0", "1.0", "missing", ""],
        ["ρ=0 & 5%", "-1.0", "", "-0.5", "3", "missing", "", "4.5", ""],
        ["one", "missing", "", "0.5", "", "", "1", "missing", "", "missing", ""],
    ]  # fmt: skip


def test_a_cell_without_a_number_is_an_empty_field_of_csv_and_a_word_stays():
    grid = Grid(["arm", "− a", "p"], [["a", NONE, NONE], ["b", difference(Sample(0.5, None, 1), ".1f"), "missing"]])
    assert grid.csv() == "arm,− a,− a low,− a high,− a n,p\na,,,,,\nb,0.5,,,1,missing\n"
    assert "| a | – | – |" in grid.markdown() and "a & -- & -- " in grid.latex("", "x")
