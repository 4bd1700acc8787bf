"""A section whose rates are searched: its trials are found among the runs, its rows are the arms at the best rates."""

from pathlib import Path

import pytest
from made import recorded, section

from adafrugal.reports import layouts, searches
from adafrugal.reports.arms import jobs
from adafrugal.reports.descent import LR, S
from adafrugal.reports.searches import SearchFile
from adafrugal.system.errors import SettingError

BASE = "scale=mini data=embedded"
ARMS = f"experiments=c4_60m/adamw,c4_60m/frugal {BASE} seed=0,1"


@pytest.fixture
def made(tmp_path):
    """A function: make runs until the searches know enough, with a loss of the rates; return the section."""

    def make(loss, command=ARMS, trials=6):
        while True:
            found = section(jobs([command]), tmp_path, search=SearchFile(trials))
            wanted = [job for each in found.searches for job in each.pending]
            if not wanted:
                return found
            for job in wanted:
                recorded(tmp_path, job.command, loss(job), seed=100)

    return make


def far_from(lr_s):
    return lambda job: 4 + abs(job.rates[LR] * job.rates[S] / lr_s - 1) + 0.1 * (job.arm == "frugal")


def test_a_section_before_any_run_asks_for_the_start_of_each_arm(tmp_path):
    found = section(jobs([ARMS]), tmp_path, search=SearchFile())
    assert [[job.name for job in each.pending] for each in found.searches] == [["adamw"], ["frugal"]]
    assert [job.seeds for job in found.jobs] == [(0, 1), (0, 1)]
    assert [job.missing for job in found.jobs] == [(0, 1), (0, 1)]
    assert "so far" in layouts.grids(found)["The search for the rates:"].markdown()


def test_the_rows_are_the_arms_at_their_best_rates_with_the_tables_seeds(made, tmp_path):
    found = made(far_from(0.004))
    assert [job.rates[LR] * job.rates[S] for job in found.jobs] == pytest.approx([0.004, 0.004])
    assert {len(each.trials) for each in found.searches} == {6}
    for job in found.jobs:
        recorded(tmp_path, job.command, 4.25, seed=1)
    after = made(far_from(0.004))
    assert [(list(job.runs), job.missing) for job in after.jobs] == [([1], (0,)), ([1], (0,))]
    grid = layouts.grids(after)["The search for the rates:"]
    assert grid.head == ["arm", "lr", "s", "c", "loss", "seeds − trial", "trials", "million tokens", "at an edge"]
    assert "| adamw | 0.064 | 0.0625 | – | 4.0000 | +0.2500 | 6 of 6, cut off | 0.2 | no |" in grid.markdown()
    assert searches.RULE in layouts.rules(after)
    assert "4.25" in layouts.grids(after)[""].markdown()


def test_a_typed_command_of_a_trial_is_the_trial(made):
    """Who types a trial's command gets its run, not another."""
    trial = made(far_from(0.004)).searches[1].trials[-1]
    assert [job.key for job in jobs([trial.command])] == [trial.key]


def test_c_is_searched_where_a_part_keeps_state_and_another_does_not():
    arms = jobs([f"experiments=c4_60m/adamw,c4_60m/frugal,c4_60m/frugal_0,c4_60m/galore {BASE}"])
    searches = section(arms, Path("none"), search=SearchFile()).searches
    names = {each.arm.name: len(each.found.best) for each in searches}
    assert names == {"adamw": 2, "frugal": 3, "frugal_0": 2, "galore": 2}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"experiments=c4_60m/adamw {BASE} seed=0,100", "seed 100, which its table uses"),
        (f"optimizer=adafactor {BASE}", "adafactor has no optimizer.split_lr_scale"),
        ("experiments=glue/rte optimizer=adamw", "losses of pre-training; rte has task=finetune"),
    ],
)
def test_what_cannot_be_searched_is_refused(command, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        section(jobs([command]), tmp_path, search=SearchFile())


def test_a_search_that_names_no_text_is_of_the_text_of_most_runs(tmp_path):
    command = "experiments=c4_60m/adamw scale=mini data=embedded"
    for place, (text, seed) in enumerate((("b", 100), ("a", 100), ("a", 0))):
        recorded(tmp_path / str(place), command, 4.5, seed, data=text * 64)
    (found,) = section(jobs([command]), tmp_path, search=SearchFile(2)).searches
    assert found.trials[0].runs[100].environment()["data"]["fingerprint"] == "a" * 64
