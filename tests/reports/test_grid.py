"""One table, three ways to write it."""

import csv
import io

from adafrugal.reports.grid import Change, Difference, Grid, Number
from adafrugal.reports.statistics import Contrast, Sample

GRID = Grid(
    ["arm", "loss", "− adamw", "state, start → end"],
    [
        ["adamw_x", Number(Sample(4.5, 0.25, 3), ".2f"), "", Change(2.0, 1.0, "MiB")],
        [
            "ρ=0 & 5%",
            Number(Sample(-1.0, None, 1), ".2f", "%"),
            Difference(Contrast(-0.5, -0.75, 0.125, 3), ".3f"),
            "missing",
        ],
        ["one", "missing", Difference(Contrast(0.5, None, None, 1), ".1f"), "missing"],
    ],
)


def test_as_markdown():
    assert GRID.markdown().splitlines() == [
        "| arm | loss | − adamw | state, start → end |",
        "| --- | ---: | ---: | ---: |",
        "| adamw_x | 4.50 ± 0.25 |  | 2.00 MiB → 1.00 MiB |",
        "| ρ=0 & 5% | -1.00% | −0.500 [−0.750, +0.125] | missing |",
        "| one | missing | +0.5 | missing |",
    ]


def test_as_latex_with_booktabs_and_nothing_that_latex_would_read_as_its_own():
    text = GRID.latex("50% & more_of it")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{50\% \& more\_of it}" in text
    assert r"adamw\_x & 4.50 $\pm$ 0.25 &  & 2.00 MiB $\to$ 1.00 MiB \\" in text
    assert r"$\rho$=0 \& 5\% & -1.00\% & $-$0.500 [$-$0.750, +0.125] & missing \\" in text
    assert text.isascii()


def test_as_csv_with_whole_numbers_in_columns_of_their_own():
    head, *rows = csv.reader(io.StringIO(GRID.csv()))
    by_name = [dict(zip(head, row, strict=True)) for row in rows]
    assert head == [
        "arm", "loss", "loss spread", "− adamw", "− adamw low", "− adamw high",
        "state, start → end start", "state, start → end end",
    ]  # fmt: skip
    assert by_name[0] == {
        "arm": "adamw_x", "loss": "4.5", "loss spread": "0.25", "− adamw": "", "− adamw low": "", "− adamw high": "",
        "state, start → end start": "2.0", "state, start → end end": "1.0",
    }  # fmt: skip
    assert (by_name[1]["− adamw"], by_name[1]["− adamw low"], by_name[1]["− adamw high"]) == ("-0.5", "-0.75", "0.125")
    assert by_name[2]["loss"] == "missing"
    assert by_name[2]["state, start → end start"] == "missing"
