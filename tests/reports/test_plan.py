"""A page knows its runs before any of them is made, and finds each of them, and no other."""

import pytest
from made import recorded, section

from adafrugal.reports import plan
from adafrugal.reports.arms import as_typed, compose_once, jobs, settings_key
from adafrugal.settings import compose
from adafrugal.system.errors import SettingError

BASE = "scale=mini data=embedded"
ADAMW = f"experiments=c4_60m/adamw {BASE}"
COMMAND = "sections: [{name: main, title: Main, commands: ['%s']}]\n"


@pytest.fixture
def page(tmp_path):
    """A function: commands -> the section that they make, filled with the runs below tmp_path."""
    return lambda *commands, **more: section(jobs(commands), tmp_path, **more)


@pytest.fixture
def record(tmp_path):
    """A function: a finished record below tmp_path."""
    return lambda words, *args, place="", **more: recorded(tmp_path / place, words, *args, **more)


def test_a_sweep_is_its_jobs_with_their_seeds_and_names():
    found = jobs([f"sweeps=c4_60m {BASE}"])
    assert [job.name for job in found] == [
        "adamw", "galore", "badam", "frugal", "frugal_0", "adafrugal_density", "adafrugal_interval", "adafrugal"
    ]  # fmt: skip
    assert {job.seeds for job in found} == {(0, 1, 2)}
    assert found[1].command == f"experiments=c4_60m/galore {BASE}"
    assert len({job.key for job in found}) == 8


def test_typed_values_are_jobs_and_two_commands_may_share_one():
    grid = f"-m experiments=c4_60m/frugal {BASE} optimizer.density=0.1,0.25 optimizer.interval=50,100"
    found = jobs([grid, f"-m experiments=c4_60m/frugal {BASE} optimizer.density=0.25 optimizer.interval=100 seed=1,2"])
    assert [job.name for job in found] == ["ρ=0.1 T=50", "ρ=0.1 T=100", "ρ=0.25 T=50", "ρ=0.25 T=100"]
    assert [job.seeds for job in found] == [(0,), (0,), (0,), (0, 1, 2)]


def test_a_name_that_two_commands_give_has_the_arms_before_it():
    arms = ("adamw", "frugal")
    found = jobs([f"-m experiments=c4_60m/{arm} {BASE} trainer.steps=200,400" for arm in arms])
    assert [job.name for job in found] == [f"{arm} steps={steps}" for arm in arms for steps in (200, 400)]


def test_a_typed_value_replaces_that_of_the_sweep():
    """As in Hydra: one value, or several."""
    sweep = f"sweeps=density {BASE} seed=0"
    one, two = (jobs([f"{sweep} optimizer.density={given}"]) for given in ("0.3", "0.3,0.4"))
    assert [job.command for job in one] == [f"experiments=c4_130m/frugal {BASE} optimizer.density=0.3"]
    assert [job.name for job in two] == ["ρ=0.3", "ρ=0.4"]
    assert {job.seeds for job in [*one, *two]} == {(0,)}


def test_a_command_that_sweeps_is_shown_as_train_takes_it():
    for command in ("-m seed=0,1", "sweeps=density optimizer.density=0.1,0.2", "optimizer.betas=[0.9,0.99]"):
        assert as_typed(command) == command
    assert as_typed("optimizer=adamw seed=0,1") == "-m optimizer=adamw seed=0,1"


@pytest.mark.parametrize("sweep", ["sweeps=glue_minilm_rates data.source=mirrors/glue", "sweeps=density scale=mini"])
def test_the_command_of_a_job_makes_the_same_run_without_its_sweep(sweep):
    job = jobs([sweep])[1]
    assert [found.key for found in jobs([job.command])] == [job.key]


def test_a_run_is_found_by_its_settings_and_no_other_run_is(page, record):
    record(f"experiments=c4_60m/frugal {BASE}", seed=1)
    record(f"experiments=c4_60m/frugal {BASE}", seed=7)
    record(f"experiments=c4_60m/frugal {BASE} optimizer.lr=0.5", 1.0)
    record(ADAMW, 1.0).set_status("running")
    adamw, frugal = page(f"-m experiments=c4_60m/adamw,c4_60m/frugal {BASE} seed=0,1").jobs
    assert (adamw.runs, adamw.missing) == ({}, (0, 1))
    assert {seed: run.summary()["validation_loss"] for seed, run in frugal.runs.items()} == {1: 4.5}
    assert frugal.missing == (0,)


def test_a_copy_of_a_data_set_may_lie_anywhere_and_is_not_the_hubs(page, record):
    record("experiments=c4_60m/adamw scale=mini data.source=elsewhere/c4")
    command = "experiments=c4_60m/adamw scale=mini"
    assert page(f"{command} data.source=mirrors/c4").runs
    assert not page(command).runs


def test_another_repository_of_the_hub_is_no_copy_though_its_name_is_the_same(page, record):
    words = "experiments=c4_60m/adamw scale=mini data=text data.source="
    run = record(f"{words}me/corpus")
    assert page(f"{words}you/corpus").runs, "me/corpus may be a directory"
    data = {"fingerprint": "0" * 64, "source": {"name": "me/corpus", "revision": "1f2e"}}
    run.write_environment(run.environment() | {"data": data})
    assert not page(f"{words}you/corpus").runs
    assert page(f"{words}me/corpus").runs and page(f"{words}./copies/corpus").runs


def test_an_encoder_may_lie_anywhere_and_another_of_the_hub_is_another():
    def key(name, kind="encoder"):
        return settings_key({"model.kind": kind, "model.name": name}, "rte")

    assert key("/here/roberta-base") == key("../there/roberta-base") != key("../there/roberta-large")
    assert len({key("me/roberta-base"), key("you/roberta-base"), key("/here/roberta-base")}) == 3
    assert key("/here/gpt2", "decoder") != key("/there/gpt2", "decoder")


def test_runs_of_another_text_or_there_twice_are_left_out_and_listed(page, record):
    for seed, data in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        record(ADAMW, 4.5, seed, data=data, place="one")
    command = f"-m {ADAMW} seed=0,1,2"
    usual, other = page(command), page(command, text="bbbb")
    assert (list(usual.jobs[0].runs), usual.jobs[0].missing, len(usual.others)) == ([0, 1], (2,), 1)
    assert (list(other.jobs[0].runs), len(other.others)) == ([2], 2)
    record(ADAMW, data="a" * 64, place="two")
    twice = page(command)
    assert (twice.jobs[0].runs[0].directory.parts[-3], len(twice.others)) == ("one", 2)


def test_a_run_that_diverged_is_not_missing(page, record):
    run = record(ADAMW)
    for reason, diverged, missing in (
        ("TrainingError: the validation loss is nan at step 20: lower optimizer.lr", (0,), (1,)),
        ("FloatingPointError: the gradient of parameter q is not finite at step 20; nothing was changed", (0,), (1,)),
        ("OSError: No space left on device", (), (0, 1)),
    ):
        run.set_status("failed", reason=reason)
        job = page(f"-m {ADAMW} seed=0,1").jobs[0]
        assert (job.runs, job.diverged, job.missing) == ({}, diverged, missing)


@pytest.mark.parametrize(("wrong", "message"), [
    ("colour: red\n", r"page\.yaml: colour: there is no such setting; .*allowed: place, title"),
    ("place: first\n", r"page\.yaml: place is 'first'; allowed: a whole number"),
    ("sections: [{name: main, title: Main}]\n", r"page\.yaml: sections\[0\]\.commands is missing"),
    ("sections: [{name: main, title: Main, commands: seed=0}]\n", r"commands is seed=0; allowed: a list"),
    (COMMAND % "experiments=nothing", "section main: experiments: there is no 'nothing'"),
    (COMMAND % "optimizer.lr=1e-3,-1", "section main: optimizer.lr is -1"),
    (COMMAND % "optimzer.lr=1", "section main: .*optimzer"),
    (COMMAND % "optimizer.lr=[", "section main: 'optimizer.lr=.' is not a setting"),
    (COMMAND % "seed=null", "section main: seed is null"),
    ("sections: [{name: main, titel: Main, commands: [seed=0]}]\n", r"titel: .*no such setting; did you mean title"),
    ("sections: [{name: main, title: Main, commands: [seed=0]}]\n", r"main: reference is 'adamw'; allowed: adafrugal"),
    ("sections: [{name: main, title: Main, commands: [seed=0 optimizer=adamw], decisions: [muon]}]\n",
     "main: decisions has no 'muon'; allowed: adamw"),
    ("sections: [{name: main, title: Main, commands: [seed=0], kind: lengths}]\n",
     "main: reference is 'adamw'; allowed: a"),
    ("sections: [{name: main, title: Main, commands: [seed=0], kind: scores, decisions: [adafrugal]}]\n",
     "main: decisions are of validation losses; kind scores has none"),
    ("sections: [{name: main, title: A, commands: [seed=0], reference: null}, {name: main, title: B, "
     "commands: [seed=0], reference: null}]\n", "two sections have the same name, among main, main"),
    ("sections: [{name: main, title: A, commands: [seed=0 optimizer.lr=1, seed=0], reference: null}]\n",
     "two rows have the same name"),
    ("sections: {\n", "page.yaml is no YAML"),
    ("", r"page\.yaml is empty"),
])  # fmt: skip
def test_an_invalid_page_file_is_named_with_its_fault(tmp_path, wrong, message):
    right = {"place": "1", "title": "A page", "about": "Words.", "commands": "[seed=0]", "sections": "[]"}
    kept = {key: value for key, value in right.items() if not wrong.startswith(f"{key}:")} if wrong else {}
    (tmp_path / "page.yaml").write_text("".join(f"{key}: {value}\n" for key, value in kept.items()) + wrong)
    with pytest.raises(SettingError, match=message):
        plan.pages(tmp_path)


def test_values_are_composed_as_hydra_does_it():
    words = ["experiments=c4_130m/adafrugal", "scale=mini", "data=embedded", "optimizer.density.steps=null",
             "optimizer.interval.threshold=2e-2", "optimizer.subspace={kind:blocks,order:random}"]  # fmt: skip
    assert compose_once(words) == compose.composed(words)[:2]


def test_settings_of_older_records_and_of_wandb_are_the_same_settings():
    one, other = (
        {"optimizer.lr": lr, "model.bias": True, "optimizer.betas": betas}
        for lr, betas in ((1, [0, 1]), (1.0, [0.0, 1.0]))
    )
    old = one | {"trainer.compile": True, "model.loss_chunk_rows": 2048}  # no part of a run's identity any more
    assert settings_key(one, "embedded") == settings_key(other, "embedded") == settings_key(old, "embedded")
    assert settings_key(one, "embedded") != settings_key(one | {"model.bias": 1}, "embedded")
