"""Verdicts of the rule of decision on made records: below, above, and every reason not to decide."""

import pytest
from made import recorded, section
from scipy import stats

from adafrugal.reports import decisions
from adafrugal.reports.arms import jobs
from adafrugal.reports.searches import SearchFile

BASE = "scale=mini data=embedded"
ARMS = "adamw", "frugal", "adafrugal", "frugal_0", "badam", "galore"
SHIFTS = {"frugal": (-0.1, -0.12, -0.08, -0.11, -0.09), "adafrugal": (0.2, 0.21, 0.19, 0.2, 0.2),
          "frugal_0": (-0.06, 0.005, -0.05, -0.04, -0.02), "badam": (-0.5, -0.51, -0.5, -0.51)}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The table against AdamW: arm -> its cells. GaLore has five seeds, and one of them diverged."""
    root = tmp_path_factory.mktemp("runs")
    shifts = SHIFTS | {"adamw": [0] * 5, "galore": [-0.4, -0.41, -0.4, -0.41, 0]}
    for arm, by_seed in shifts.items():
        for seed, shift in enumerate(by_seed):
            run = recorded(root, f"experiments=c4_60m/{arm} {BASE}", 4.5 + seed / 10 + shift, seed)
    run.set_status("failed", reason="TrainingError: the training loss is nan at step 20")
    names = ",".join(f"c4_60m/{arm}" for arm in ARMS)
    table = decisions.grid(section(jobs([f"-m experiments={names} seed=0,1,2,3,4 {BASE}"]), root), "adamw")
    assert table.head == ["arm", "n", "− adamw, 95%", "p", "p, Holm", "verdict"]
    return {row[0]: row[1:] for row in table.rows}


def test_every_arm_but_the_reference_has_a_row(found):
    assert list(found) == list(ARMS[1:])


@pytest.mark.parametrize(("arm", "n", "verdict"), [
    ("frugal", "5", "below"), ("adafrugal", "5", "above"), ("frugal_0", "5", "not decided"),
    ("badam", "4", "4 of 5 seeds"), ("galore", "4", "not decided: 1 diverged"),
])  # fmt: skip
def test_the_verdict(found, arm, n, verdict):
    assert (found[arm][0], found[arm][-1]) == (n, verdict)


def test_arms_that_cannot_be_decided_count_in_the_adjustment_and_show_no_p(found):
    p = {arm: stats.ttest_1samp(SHIFTS[arm], 0).pvalue for arm in ("adafrugal", "frugal", "frugal_0")}
    for arm, factor in zip(p, (5, 4, 3), strict=True):  # from the smallest
        assert found[arm][2].values[""] == pytest.approx(p[arm], rel=1e-6)
        assert found[arm][3].values[""] == pytest.approx(factor * p[arm], rel=1e-6)
    assert 0.03 < p["frugal_0"] < 0.05, "alone it would be below"
    assert found["badam"][2:4] == found["galore"][2:4] == ["–", "–"]


def test_five_of_six_planned_seeds_do_not_decide(tmp_path):
    """Else one could look after each seed, and stop at the right one."""
    for seed in range(5):
        recorded(tmp_path, f"experiments=c4_60m/adamw {BASE}", 4.5 + seed / 10, seed)
        recorded(tmp_path, f"experiments=c4_60m/frugal {BASE}", 4.0 + seed / 11, seed)
    for planned, verdict in (("0,1,2,3,4", "below"), ("0,1,2,3,4,5", "5 of 6 seeds")):
        made = section(jobs([f"-m experiments=c4_60m/adamw,c4_60m/frugal seed={planned} {BASE}"]), tmp_path)
        assert decisions.grid(made, "adamw").rows[0][-1] == verdict


def test_nothing_is_decided_while_the_search_for_the_rates_goes_on(tmp_path):
    """Its next trial may change which runs the table is made of."""
    for seed in range(5):
        recorded(tmp_path, f"experiments=c4_60m/adamw {BASE}", 4.5 + seed / 10, seed)
        recorded(tmp_path, f"experiments=c4_60m/frugal {BASE}", 4.0 + seed / 11, seed)
    planned = jobs([f"-m experiments=c4_60m/adamw,c4_60m/frugal seed=0,1,2,3,4 {BASE}"])
    made = section(planned, tmp_path, search=SearchFile())
    assert [len(job.runs) for job in made.jobs] == [5, 5]
    assert decisions.grid(made, "adamw").rows[0][3:] == ["–", "–", "the search goes on"]
