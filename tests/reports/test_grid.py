"""One table, three ways to write it."""

import csv
import io

from adafrugal.reports.grid import Change, Difference, Grid, Number
from adafrugal.reports.statistics import Contrast, Sample

GRID = Grid(
    ["arm", "loss", "− adamw", "state"],
    [
        ["adamw_x", Number(Sample(4.5, 0.25, 3), ".2f"), "", Change(2.0, 1.0, "MiB")],
        [
            "ρ=0 & 5%",
            Number(Sample(-1.0, None, 1), ".2f"),
            Difference(Contrast(-0.5, -0.75, 0.125, 3), ".3f"),
            "missing",
        ],
        ["one", "missing", Difference(Contrast(0.5, None, None, 1), ".1f"), "missing"],
    ],
)


def test_as_markdown():
    assert GRID.markdown().splitlines() == [
        "| arm | loss | − adamw | state |",
        "| --- | ---: | ---: | ---: |",
        "| adamw_x | 4.50 ± 0.25 |  | 2.00 MiB → 1.00 MiB |",
        "| ρ=0 & 5% | -1.00 | −0.500 [−0.750, +0.125] | missing |",
        "| one | missing | +0.5 (1 seed) | missing |",
    ]


def test_as_latex_with_booktabs_and_nothing_that_latex_would_read_as_its_own():
    text = GRID.latex("50% & more_of it")
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{50\% \& more\_of it}" in text
    assert r"adamw\_x & 4.50 $\pm$ 0.25 &  & 2.00 MiB $\to$ 1.00 MiB \\" in text
    assert r"$\rho$=0 \& 5\% & -1.00 & $-$0.500 [$-$0.750, +0.125] & missing \\" in text
    assert text.isascii()


def test_as_csv_with_whole_numbers_in_columns_of_their_own():
    head, *rows = csv.reader(io.StringIO(GRID.csv()))
    by_name = [dict(zip(head, row, strict=True)) for row in rows]
    assert head == [
        "arm", "loss", "loss spread", "− adamw", "− adamw low", "− adamw high", "− adamw n",
        "state at the start MiB", "state at the end MiB",
    ]  # fmt: skip
    assert by_name[0] == {
        "arm": "adamw_x", "loss": "4.5", "loss spread": "0.25", "− adamw": "", "− adamw low": "", "− adamw high": "",
        "− adamw n": "", "state at the start MiB": "2.0", "state at the end MiB": "1.0",
    }  # fmt: skip
    assert (by_name[1]["− adamw"], by_name[1]["− adamw low"], by_name[1]["− adamw high"]) == ("-0.5", "-0.75", "0.125")
    assert by_name[2]["loss"] == "missing"
    assert by_name[2]["state at the start MiB"] == "missing"


def test_the_best_stands_out_where_people_read_and_is_a_number_where_they_compute():
    grid = Grid(["arm", "loss"], [["a", Number(Sample(4.5, None, 1), ".1f", is_best=True)]])
    assert "| a | **4.5** |" in grid.markdown()
    assert r"a & \textbf{4.5} \\" in grid.latex("")
    assert grid.csv().splitlines()[1].startswith("a,4.5")


def test_units_stand_in_the_head_of_a_csv():
    grid = Grid(["arm", "share"], [["a", Number(Sample(4.5, None, 1), ".1f", "%")]])
    assert grid.csv().splitlines() == ["arm,share %,share spread %", "a,4.5,"]
    assert "| a | 4.5% |" in grid.markdown()


def test_an_interval_that_ends_at_zero_has_an_end():
    grid = Grid(["arm", "d"], [["a", Difference(Contrast(-0.5, -1.0, 0.0, 2), ".1f")]])
    assert grid.csv().splitlines() == ["arm,d,d low,d high,d n", "a,-0.5,-1.0,0.0,2"]
