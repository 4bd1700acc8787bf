"""Spreads over both kinds of seeds, on made records."""

from dataclasses import replace

import pytest
from made import recorded, section

from adafrugal.reports import layouts, spreads
from adafrugal.reports.arms import jobs
from adafrugal.system.errors import SettingError

BASE = "experiments=c4_60m/adamw scale=mini data=embedded"
COMMANDS = [f"-m {BASE} seed=0,1,2 data.seed=null,0", f"-m {BASE} seed=0 data.seed=0,1,2,3"]


def table(root):
    made = section(jobs(COMMANDS), root, kind="spreads")
    (row,) = layouts.grids(made)[""].rows
    return row


def test_each_kind_of_seed_has_the_spread_of_its_runs(tmp_path):
    for seed, loss in enumerate((4.0, 4.1, 4.2)):
        recorded(tmp_path, BASE, loss, seed)
    for seed, loss in enumerate((4.00, 4.01, 4.02)):  # seed 0 stands in both lines
        recorded(tmp_path, f"{BASE} data.seed=0", loss, seed)
    for order, loss in ((1, 4.05), (2, 4.10), (3, 4.15)):
        recorded(tmp_path, f"{BASE} data.seed={order}", loss, 0)
    name, *cells = table(tmp_path)
    assert [name, *(cell.values[" n"] for cell in cells)] == ["adamw", 3, 3, 4]
    assert [cell.values[""] for cell in cells] == pytest.approx([0.1, 0.01, 0.0645497], rel=1e-4)
    ends = [0.1 * (2 / chi_squared) ** 0.5 for chi_squared in (7.377759, 0.0506356)]  # of 2 degrees of freedom
    assert [cells[0].values[name] for name in (" from", " to")] == pytest.approx(ends)
    assert cells[0].text == "0.1000 [0.0521, 0.6285], 3 runs"


def test_a_spread_needs_two_runs(tmp_path):
    recorded(tmp_path, BASE, 4.0, 0)
    assert table(tmp_path) == ["adamw", "missing", "missing", "missing"]


def test_a_diverged_run_is_counted(tmp_path):
    for seed, loss in enumerate((4.0, 4.1)):
        recorded(tmp_path, BASE, loss, seed)
    made = section(jobs(COMMANDS), tmp_path, kind="spreads")
    with_one = [replace(job, diverged=(2,)) if job.settings.data.seed is None else job for job in made.jobs]
    assert spreads.grid(with_one).rows[0][1].text == "0.0707 [0.0315, 2.2564], 2 runs, 1 diverged"


@pytest.mark.parametrize(("command", "said"), [
    ("optimizer.lr=0.01,0.02 seed=0,1,2", "lr=0.01 sweeps optimizer.lr, too"),
    ("seed=0,1,2 data.seed=0,1", "adamw has several seeds at more than one data.seed"),
])  # fmt: skip
def test_other_jobs_are_refused(command, said):
    with pytest.raises(SettingError, match=said):
        spreads.arms(jobs([f"-m {BASE} {command}"]))


def test_the_rule_says_what_the_numbers_are(tmp_path):
    assert spreads.RULE in layouts.rules(section(jobs(COMMANDS), tmp_path, kind="spreads"))
