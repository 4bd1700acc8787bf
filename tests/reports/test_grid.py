"""One table, written in three ways."""

import csv
import io

from adafrugal.reports.grid import Change, Difference, Grid, Number
from adafrugal.reports.statistics import Contrast, Sample

GRID = Grid(
    ["arm", "loss", "− adamw", "state", "share"],
    [
        ["adamw_x", Number(Sample(4.5, 0.25, 3), ".2f"), "", Change(2.0, 1.0, "MiB"), "missing"],
        ["ρ=0 & 5%", Number(Sample(-1.0, None, 1), ".2f"), Difference(Contrast(-0.5, -0.75, 0.0, 3), ".3f"), "missing",
         Number(Sample(4.5, None, 1), ".1f", "%", is_best=True)],
        ["one", "missing", Difference(Contrast(0.5, None, None, 1), ".1f"), "missing", "missing"],
    ],
)  # fmt: skip


def test_as_markdown_with_the_best_in_bold():
    assert GRID.markdown().splitlines() == [
        "| arm | loss | − adamw | state | share |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| adamw_x | 4.50 ± 0.25 |  | 2.00 MiB → 1.00 MiB | missing |",
        "| ρ=0 & 5% | -1.00 | −0.500 [−0.750, +0.000] | missing | **4.5%** |",
        "| one | missing | +0.5 (1 seed) | missing | missing |",
    ]


def test_as_latex_with_booktabs_and_every_special_character_escaped():
    text = GRID.latex("50% & more_of it")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{50\% \& more\_of it}" in text
    assert r"adamw\_x & 4.50 $\pm$ 0.25 &  & 2.00 MiB $\to$ 1.00 MiB & missing \\" in text
    assert r"$\rho$=0 \& 5\% & -1.00 & $-$0.500 [$-$0.750, +0.000] & missing & \textbf{4.5\%} \\" in text
    assert text.isascii()


def test_as_csv_with_unrounded_numbers_in_columns_of_their_own():
    assert list(csv.reader(io.StringIO(GRID.csv()))) == [
        ["arm", "loss", "loss spread", "− adamw", "− adamw low", "− adamw high", "− adamw n",
         "state at the start MiB", "state at the end MiB", "share %", "share spread %"],
        ["adamw_x", "4.5", "0.25", "", "", "", "", "2.0", "1.0", "missing", ""],
        ["ρ=0 & 5%", "-1.0", "", "-0.5", "-0.75", "0.0", "3", "missing", "", "4.5", ""],
        ["one", "missing", "", "0.5", "", "", "1", "missing", "", "missing", ""],
    ]  # fmt: skip
