"""Steps to a reference's loss, on made records of three lengths."""

import csv
import io
import math
from dataclasses import replace

import pytest
from made import recorded, section

from adafrugal.reports import layouts, lengths, pages, plan
from adafrugal.reports.arms import jobs

BASE = "scale=mini data=embedded"
LOSSES = {  # arm -> length -> loss, less a seed's own; AdamW's at the end is 4.5
    "adamw": {200: 4.9, 300: 4.7, 400: 4.5},
    "frugal": {200: 4.7, 300: 4.6, 400: 4.4},  # halfway between 300 and 400, on the logarithm
    "adafrugal": {200: 4.46, 300: 4.4, 400: 4.3},
    "frugal_0": {200: 5.0, 300: 4.9, 400: 4.8},
    "badam": {200: 5.0, 400: 4.4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The section of all arms of `LOSSES` but GaLore, which has no runs, each with three seeds."""
    root = tmp_path_factory.mktemp("runs")
    for arm, by_steps in LOSSES.items():
        for steps, loss in by_steps.items():
            for seed in range(3):
                spread = {200: 0.02, 300: 0.01, 400: 0.0}[steps] * (seed - 1) * (arm != "adamw")
                words = f"experiments=c4_60m/{arm} {BASE} trainer.steps={steps}"
                recorded(root, words, loss + seed / 10 + spread, seed)
    names = ",".join(f"c4_60m/{arm}" for arm in (*LOSSES, "galore"))
    command = f"-m experiments={names} trainer.steps=400,200,300 seed=0,1,2 {BASE}"
    return section(jobs([command]), root, kind="lengths")


@pytest.fixture(scope="module")
def table(made):
    """The table: arm -> its cells, as text."""
    grid = layouts.grids(made)[""]
    assert grid.head == ["arm", "n", "200 steps (50%)", "300 steps (75%)", "400 steps (100%)", "steps to adamw's loss"]
    return {row[0]: [getattr(cell, "text", cell) for cell in row[1:]] for row in grid.rows}


def test_a_row_is_an_arm_and_a_column_a_length(table):
    assert list(table) == [*LOSSES, "galore"]
    assert table["adamw"] == ["3", "5.0000 ± 0.1000", "4.8000 ± 0.1000", "4.6000 ± 0.1000", "–"]
    assert table["badam"][2] == "missing"
    assert table["galore"] == ["0", *["missing"] * 4]


@pytest.mark.parametrize(("arm", "shown"), [
    ("adafrugal", "≤ 50% [≤ 50%, 52%]"), ("frugal_0", "> 100%"), ("badam", "missing"),
])  # fmt: skip
def test_a_loss_reached_outside_the_lengths_is_said_to_be(table, arm, shown):
    assert table[arm][-1] == shown


def test_the_share_is_interpolated_on_the_logarithm_and_paired_by_seed(made):
    row = {row[0]: row[-1] for row in layouts.grids(made)[""].rows}["frugal"]
    assert row.values[""] == pytest.approx(math.sqrt(0.75))
    half = 4.3027 * 0.01 / math.sqrt(3)  # the difference is 0.1 − 0.2 w ± half (1 − w), w from 300 to 400
    for name, sign in ((" low", -1), (" high", 1)):
        w = (0.1 + sign * half) / (0.2 + sign * half)
        assert row.values[name] == pytest.approx(0.75 ** (1 - w), abs=0.002)
    assert row.text == "87% [85%, 88%]"


def test_a_share_outside_the_lengths_is_words_in_other_formats_too(made):
    grid = layouts.grids(made)[""]
    assert r"& $>$ 100\% \\" in grid.latex("", "x") and r"$\le$ 50\%" in grid.latex("", "x")
    lines = list(csv.reader(io.StringIO(grid.csv())))
    assert {line[0]: line[-4:] for line in lines}["frugal_0"] == ["> 100%", "> 100%", "> 100%", "3"]


def test_a_share_of_the_seeds_that_did_not_diverge_is_not_given(made):
    """The survivors may be the lucky ones."""
    for arm in ("frugal", "adamw"):
        jobs = [replace(job, diverged=(3,)) if job.arm == arm and "400" in job.command else job for job in made.jobs]
        shares = {row[0]: getattr(row[-1], "text", row[-1]) for row in lengths.grid(jobs, "adamw").rows}
        assert shares["frugal"] == "diverged"
        assert shares["adafrugal"] == ("diverged" if arm == "adamw" else "≤ 50% [≤ 50%, 52%]")


def test_one_arm_is_named_by_its_experiment(tmp_path):
    made = section(jobs([f"-m experiments=c4_60m/adamw trainer.steps=200,400 {BASE}"]), tmp_path)
    assert {arm: list(by_steps) for arm, by_steps in lengths.arms(made.jobs).items()} == {"adamw": [200, 400]}


def test_the_page_says_how_the_share_is_found(made, tmp_path):
    pages.write([plan.Page("page", plan.PageFile(1, "A page", "About."), [made])], tmp_path / "out")
    assert lengths.RULE in (tmp_path / "out" / "page" / "README.md").read_text()
