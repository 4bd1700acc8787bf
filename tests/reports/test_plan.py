"""A page knows its runs before any of them is made, and finds each of them, and no other."""

import pytest
from made import recorded

from adafrugal.reports import plan, records
from adafrugal.reports.arms import compose_once, settings_key
from adafrugal.settings import compose
from adafrugal.system.errors import SettingError

ARMS = "experiments=c4_60m/adamw,c4_60m/frugal scale=mini data=embedded"


@pytest.fixture
def page(tmp_path):
    """A function: commands -> the page of one section that they make, filled with the runs below tmp_path/runs."""

    def make(*commands, **more):
        lines = [f"  - name: main\n    title: Main\n    commands: {list(commands)}\n"]
        lines += [f"    {key}: {value}\n" for key, value in ({"reference": "null"} | more).items()]
        head = "place: 1\ntitle: A page\nabout: Words.\ncommands: [sweeps=c4_60m]\nsections:\n"
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / "page.yaml").write_text(head + "".join(lines))
        return plan.filled(plan.pages(tmp_path / "tables"), records.find([tmp_path / "runs"]))[0]

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


def test_a_value_that_is_typed_takes_the_place_of_its_sweep(page):
    """As Hydra has it: one value, or several."""
    sweep = "sweeps=density scale=mini data=embedded seed=0"
    one, two = (page(f"{sweep} optimizer.density={given}").sections[0].jobs for given in ("0.3", "0.3,0.4"))
    assert [job.command for job in one] == ["experiments=c4_130m/frugal scale=mini data=embedded optimizer.density=0.3"]
    assert [job.name for job in two] == ["ρ=0.3", "ρ=0.4"]
    assert {job.seeds for job in [*one, *two]} == {(0,)}


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
    ("experiments=nothing", "section main: experiments: there is no 'nothing'"),
    ("optimizer.lr=1e-3,-1", "section main: optimizer.lr is -1"),
    ("optimzer.lr=1", "section main: .*optimzer"),
    ("optimizer.lr=[", "section main: 'optimizer.lr=.' is not a setting"),
    ("seed=null", "section main: seed is null"),
])  # fmt: skip
def test_a_command_that_train_py_would_refuse_is_refused(page, commands, message):
    with pytest.raises(SettingError, match=message):
        page(commands)


@pytest.mark.parametrize(("wrong", "message"), [
    ("colour: red\n", r"page\.yaml: colour: there is no such setting; .*allowed: place, title"),
    ("place: first\n", r"page\.yaml: place: value 'first' .*could not be converted to Integer"),
    ("sections: [{name: main, title: Main}]\n", r"page\.yaml: sections\[0\]\.commands: "),
    ("sections: [{name: main, title: Main, commands: seed=0}]\n", r"commands is seed=0; allowed: a list"),
    ("sections: [{name: main, titel: Main, commands: [seed=0]}]\n", r"titel: .*no such setting; did you mean title"),
    ("sections: [{name: main, title: Main, commands: [seed=0]}]\n", r"main: reference is 'adamw'; allowed: adafrugal"),
    ("sections: [{name: main, title: A, commands: [seed=0], reference: null}, {name: main, title: B, "
     "commands: [seed=0], reference: null}]\n", "two sections have the same name, among main, main"),
    ("sections: [{name: main, title: A, commands: [seed=0 optimizer.lr=1, seed=0], reference: null}]\n",
     "two rows have the same name"),
    ("sections: {\n", "page.yaml is no YAML"),
    ("", r"page\.yaml: (place|title|about|commands|sections): "),
])  # fmt: skip
def test_a_page_that_is_not_as_it_should_be_is_named_with_what_is_wrong(tmp_path, wrong, message):
    right = {"place": "1", "title": "A page", "about": "Words.", "commands": "[seed=0]", "sections": "[]"}
    kept = {key: value for key, value in right.items() if not wrong.startswith(f"{key}:")} if wrong else {}
    (tmp_path / "page.yaml").write_text("".join(f"{key}: {value}\n" for key, value in kept.items()) + wrong)
    with pytest.raises(SettingError, match=message):
        plan.pages(tmp_path)


def test_values_are_composed_as_hydra_does_it():
    words = ["experiments=c4_130m/adafrugal", "scale=mini", "data=embedded", "optimizer.density.steps=null",
             "optimizer.interval.threshold=2e-2", "optimizer.subspace={kind:blocks,order:random}"]  # fmt: skip
    quick, choices = compose_once(words)
    whole, chosen, _ = compose.composed(words)
    assert (quick, choices) == (whole, chosen)


def test_runs_that_read_another_text_are_left_out_and_said(page, tmp_path):
    for seed, data in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        recorded(tmp_path / "runs", "experiments=c4_60m/adamw scale=mini data=embedded", 4.5, seed, data=data)
    command = "-m experiments=c4_60m/adamw seed=0,1,2 scale=mini data=embedded"
    section = page(command).sections[0]
    assert (list(section.jobs[0].runs), section.jobs[0].missing, len(section.others)) == ([0, 1], (2,), 1)
    section = page(command, text="bbbb").sections[0]
    assert (list(section.jobs[0].runs), len(section.others)) == ([2], 2)


def test_a_run_that_is_there_twice_counts_once(page, tmp_path):
    for place in ("one", "two"):
        recorded(tmp_path / "runs" / place, "experiments=c4_60m/adamw scale=mini data=embedded", 4.5)
    section = page("experiments=c4_60m/adamw scale=mini data=embedded").sections[0]
    assert section.jobs[0].runs[0].directory.parts[-3] == "one"
    assert len(section.others) == 1


def test_a_run_of_a_seed_that_is_not_asked_for_is_no_part(page, tmp_path):
    recorded(tmp_path / "runs", "experiments=c4_60m/adamw scale=mini data=embedded", 4.5, seed=7)
    assert page("experiments=c4_60m/adamw scale=mini data=embedded").sections[0].jobs[0].runs == {}


def test_a_run_that_diverged_is_not_missing(page, tmp_path):
    record = recorded(tmp_path / "runs", "experiments=c4_60m/adamw scale=mini data=embedded", 4.5)
    (record.directory / "summary.json").unlink()
    record.set_status("failed", reason="TrainingError: the validation loss is nan at step 20: lower optimizer.lr")
    job = page("-m experiments=c4_60m/adamw seed=0,1 scale=mini data=embedded").sections[0].jobs[0]
    assert (job.runs, job.diverged, job.missing) == ({}, (0,), (1,))
    record.set_status("failed", reason="OSError: No space left on device")
    job = page("-m experiments=c4_60m/adamw seed=0,1 scale=mini data=embedded").sections[0].jobs[0]
    assert (job.diverged, job.missing) == ((), (0, 1))


def test_a_whole_number_is_the_same_setting_with_and_without_its_point():
    one, other = (
        {"optimizer.lr": lr, "model.bias": True, "optimizer.betas": betas}
        for lr, betas in ((1, [0, 1]), (1.0, [0.0, 1.0]))
    )
    assert settings_key(one, "embedded") == settings_key(other, "embedded")
    assert settings_key(one, "embedded") != settings_key(one | {"model.bias": 1}, "embedded")


def test_what_is_no_part_of_a_run_any_more_does_not_part_it_from_its_old_record():
    new = {"optimizer.lr": 0.1}
    old = new | {"trainer.compile": True, "model.loss_chunk_rows": 2048}
    assert settings_key(old, "embedded") == settings_key(new, "embedded")
