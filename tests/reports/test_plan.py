"""A page knows its runs before any of them is made, and finds each of them, and no other."""

import pytest
from conftest import REPOSITORY
from made import recorded

from adafrugal import composition
from adafrugal.config import SettingError
from adafrugal.reports import plan, table

ARMS = "experiments=c4_60m/adamw,c4_60m/frugal scale=mini data=embedded"


@pytest.fixture
def page(tmp_path):
    """A function: commands -> the page of one section that they make, filled with the runs below tmp_path/runs."""

    def make(*commands, **more):
        lines = [f"  - name: main\n    title: Main\n    commands: {list(commands)}\n"]
        lines += [f"    {key}: {value}\n" for key, value in more.items()]
        head = "place: 1\ntitle: A page\nabout: Words.\ncommand: sweeps=c4_60m\nsections:\n"
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / "page.yaml").write_text(head + "".join(lines))
        return plan.filled(plan.pages(tmp_path / "tables"), table.find([tmp_path / "runs"]))[0]

    return make


def test_a_sweep_is_its_jobs_with_their_seeds_and_names(page):
    jobs = page("sweeps=c4_60m scale=mini data=embedded").sections[0].jobs
    assert [job.name for job in jobs] == [
        "adamw", "galore", "badam", "frugal", "frugal_0", "adafrugal_density", "adafrugal_interval", "adafrugal"
    ]  # fmt: skip
    assert {job.seeds for job in jobs} == {(0, 1, 2)}
    assert jobs[1].command == "experiments=c4_60m/galore scale=mini data=embedded"
    assert len({job.key for job in jobs}) == 8


def test_typed_values_are_jobs_and_short_names(page):
    jobs = page("-m experiments=c4_130m/frugal optimizer.density=0.1,0.25 optimizer.interval=50,100").sections[0].jobs
    assert [job.name for job in jobs] == ["ρ=0.1 T=50", "ρ=0.1 T=100", "ρ=0.25 T=50", "ρ=0.25 T=100"]
    assert {job.seeds for job in jobs} == {(0,)}


def test_the_command_of_a_job_makes_the_same_run_without_its_sweep(page):
    for command in ("sweeps=glue_minilm data.source=mirrors/glue", "sweeps=density scale=mini", "sweeps=modules"):
        for job in page(command).sections[0].jobs[:3]:
            again = page(job.command).sections[0].jobs
            assert [found.key for found in again] == [job.key]


def test_a_run_is_found_by_its_settings_and_no_other_run_is(page, tmp_path):
    recorded(tmp_path / "runs", "experiments=c4_60m/frugal scale=mini data=embedded", 4.5, seed=1)
    recorded(tmp_path / "runs", "experiments=c4_60m/frugal scale=mini data=embedded optimizer.lr=0.5", 1.0)
    recorded(tmp_path / "runs", "experiments=c4_60m/frugal scale=mini data.source=mirrors/c4", 1.0)
    unfinished = recorded(tmp_path / "runs", "experiments=c4_60m/adamw scale=mini data=embedded", 1.0)
    unfinished.set_status("running")
    adamw, frugal = page(f"-m {ARMS} seed=0,1").sections[0].jobs
    assert (adamw.runs, adamw.missing) == ({}, (0, 1))
    assert ({seed: run.summary()["validation_loss"] for seed, run in frugal.runs.items()}, frugal.missing) == (
        {1: 4.5},
        (0,),
    )


def test_a_copy_of_a_data_set_may_lie_anywhere_and_is_not_the_hubs(page, tmp_path):
    recorded(tmp_path / "runs", "experiments=c4_60m/adamw scale=mini data.source=elsewhere/c4", 4.5)
    command = "experiments=c4_60m/adamw scale=mini"
    assert page(f"{command} data.source=mirrors/c4").sections[0].jobs[0].runs
    assert not page(command).sections[0].jobs[0].runs


def test_two_commands_may_share_a_job_and_add_seeds_to_it(page):
    grid = "-m experiments=c4_130m/frugal scale=mini optimizer.interval=25,50"
    more = "-m experiments=c4_130m/frugal scale=mini optimizer.interval=50 seed=1,2"
    jobs = page(grid, more).sections[0].jobs
    assert [(job.name, job.seeds) for job in jobs] == [("T=25", (0,)), ("T=50", (0, 1, 2))]


@pytest.mark.parametrize(("commands", "message"), [
    ("experiments=nothing", "there is no 'nothing'"),
    ("optimizer.lr=1e-3,-1", "optimizer.lr is -1"),
])  # fmt: skip
def test_a_command_that_train_py_would_refuse_is_refused(page, commands, message):
    with pytest.raises(SettingError, match=message):
        page(commands)


def test_a_key_that_a_page_should_not_have_is_named_with_its_file(page):
    with pytest.raises(SettingError, match=r"page\.yaml.*colour"):
        page("seed=0", colour="red")


def test_values_are_composed_as_hydra_does_it():
    words = ["experiments=c4_130m/adafrugal", "scale=mini", "data=embedded", "optimizer.density.steps=null",
             "optimizer.interval.threshold=2e-2", "optimizer.subspace={kind:blocks,order:random}"]  # fmt: skip
    quick, choices = plan._composed(words)
    whole, chosen, _ = composition.composed(words)
    assert (quick, choices) == (whole, chosen)


def test_every_page_of_the_repository_has_runs_to_be_made_and_a_command_that_is_one_of_its_sections():
    found = plan.pages()
    assert [page.place for page in found] == list(range(1, len(found) + 1))
    for page in found:
        assert page.command in {command for section in page.sections for command in section.commands}
        for section in page.sections:
            assert section.jobs
            names = [job.name for job in section.jobs]
            assert section.reference is None or section.kind != "comparison" or section.reference in names, page.name
    assert (REPOSITORY / "experiments" / "tables").is_dir()
