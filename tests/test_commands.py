"""Every command of docs/runs.md and docs/tables.md is run: in two steps here, by another test, or not for a reason."""

import re
import shlex
import sys

import pytest
from conftest import REPOSITORY
from made import recorded

from adafrugal.reports import __main__ as reports
from adafrugal.reports.arms import jobs
from adafrugal.settings.compose import check
from adafrugal.settings.naming import SHORT
from adafrugal.training.session import run

ELSEWHERE = {  # beginning of a command, or all of it with $ at the end -> the test that runs it or all its parts
    "python train.py -m optimizer.lr=1e-3,3e-3": "tracking/test_wandb.py: names_group_tags_and_axis",
    "python train.py tracking=tensorboard": "tracking/test_tensorboard.py: train_py_writes_it",
    "python -m adafrugal.reports --watch": "reports/test_live.py: watch_follows_until_ctrl_c",
    "python train.py --dry-run": "launching/test_dry_run.py: the_commands_of_the_page",
    "python train.py sweeps=c4_130m --dry-run": "launching/test_dry_run.py: the_commands_of_the_page",
    "python train.py optimizer=muon --dry-run": "launching/test_dry_run.py: the_commands_of_the_page",
    "python train.py -m scale=mini optimizer=adamw": "launching/test_dry_run.py: the_commands_of_the_page",
    "python train.py --cfg job": "launching/test_dry_run.py: the_base_of_a_sweep_is_called_so",
    "python train.py -m optimizer=adamw,frugal,adafrugal$": "test_train.py: a_multirun_trains_every_optimizer",
    "python train.py -m hydra/launcher=gpus": "launching/test_launchers.py: a_job_that_fails_leaves_the_others_alone",
    "python train.py -m seed=0,1 optimizer.lr=": "training/test_branch.py: the_commands_of_the_page_run",
    "python train.py schedule=": "training/test_branch.py: the_commands_of_the_page_run",
    "python -m adafrugal.training.evaluate": "training/test_evaluate.py: the_section_of_the_docs_runs",
    "python -m adafrugal.reports --page": "reports/test_own_pages.py: the_three_commands_make_a_table_of_ones_own",
    "python train.py -m optimizer=adamw,galore,adafrugal": "reports/test_own_pages.py: the_three_commands_make",
    "python -m adafrugal.reports --wandb": "tracking/test_wandb_fetch.py: fetched_records_make_the_same_table",
    "python -m adafrugal.launching.search": "launching/test_search.py: trials_and_then_the_table_s_runs",
    "make tables": "reports/test_pages.py: the_committed_pages_are_made_of_the_committed_records",
}  # fmt: skip
NOT_RUN = {  # beginning of a command -> why; it is composed by tests/test_readme.py, if it is one of train.py
    "hf upload": "sends to the hub; training/test_evaluate.py compares its words with the command's help",
    "wandb sync": "sends to W&B's server",
    "python train.py tracking.mode=online": "needs an account",
    "tensorboard --logdir": "a server that does not end",
    "python train.py model=decoder model.name=openai": "needs the hub; training/tasks/test_weights.py has a small one",
    "python train.py experiments=c4_130m/adafrugal": "needs C4, and a GPU for days",
    "python train.py sweeps=c4_130m$": "needs C4, and a GPU for days",
}  # fmt: skip
FEW = ["trainer.steps=4", "eval.tokens=64"]
SMALL = [  # what is beside scale=smoke in place of scale=mini
    "trainer.batch_size=8", "trainer.micro_batch_size=8", "trainer.precision=fp32", "model.num_hidden_layers=4",
    "schedule.warmup=1", "schedule.cycle=4",
]  # fmt: skip


def commands():
    found = []
    for page in ("runs", "tables"):
        text = (REPOSITORY / "docs" / f"{page}.md").read_text().replace("\\\n", " ")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        found += [re.split(r" +# ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(filter(None, found)))


def entry(command):
    """What ELSEWHERE and NOT_RUN have of a command."""
    return [start for start in {**ELSEWHERE, **NOT_RUN} if f"{command}$".startswith(start)]


HERE = [command for command in commands() if not entry(command)]


def test_each_command_has_one_entry_at_most_each_entry_a_command_and_each_test_is_there():
    entries = [start for command in commands() for start in entry(command)]
    assert all(len(entry(command)) <= 1 for command in commands())
    assert {*entries} == {*ELSEWHERE, *NOT_RUN}
    assert {command.partition(" ")[0] for command in HERE} == {"python"}
    for file, _, name in (place.partition(": ") for place in ELSEWHERE.values()):
        assert f"def test_{name}" in (REPOSITORY / "tests" / file).read_text(), name


@pytest.mark.parametrize("command", [command for command in HERE if command.startswith("python train.py")])
def test_a_command_of_train_py_makes_its_runs(command, train, made, smoke, tmp_path, monkeypatch):
    """Four steps of the tiny model, two seeds, the first and the last job of a sweep, the checkpoint of another run."""
    monkeypatch.chdir(tmp_path)
    if "corpus/" in command:
        (tmp_path / "corpus").mkdir()
        text = "\n\n".join(f"Paragraph {i} returns {i * i} gradients." for i in range(2000))
        (tmp_path / "corpus" / "a.txt").write_text(text)
    (checkpoint,) = smoke.directory.glob("checkpoints/step-*")
    words = [re.sub(r"runs/.*", str(checkpoint), word) for word in shlex.split(command)[2:]]
    words = [word for word in words if not word.startswith("scale=")] + FEW
    if "-m" in words:
        done = train(*(word.replace("0,1,2,3,4", "0,1") for word in words))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("validation loss") == 2
    elif any(word.startswith("sweeps=") for word in words):
        small = SMALL if "scale=mini" in command else []
        first, *_, last = jobs([shlex.join(["scale=smoke", *words, *small])])
        for job in (first, last):
            assert made(*shlex.split(job.command)).summary()["steps"] == 4
    else:
        assert made("scale=smoke", *words).summary()["steps"] == 4


@pytest.fixture
def made(composed, cache_root, tmp_path, no_estimate):
    """A function: words of train.py -> the record of their run."""

    def make(*words):
        places = [f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}", "tracking=local"]
        settings, choices = composed(*[word for word in words if word != "tracking=local"], *places)
        return run(check(settings, choices), choices)[0]

    return make


def test_the_commands_of_reports_read_the_runs_and_write_what_the_pages_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path / "runs" / "mine", "scale=smoke data=embedded optimizer=frugal", 4.5)
    typed = [command for command in HERE if not command.startswith("python train.py")]
    assert len(typed) == 5
    for words in map(shlex.split, typed):
        assert words[:3] == ["python", "-m", "adafrugal.reports"]
        monkeypatch.setattr(sys, "argv", words[2:])
        assert reports.main() == 0
        out = capsys.readouterr().out
        said = r"\| frugal \| 1 \| 20 \| 4\.5000 \||1 runs → runs/(index\.html|mine)\n|mine\.tar\.xz\n"
        assert re.search(said, out)
    assert (tmp_path / "runs" / "index.html").exists() and (tmp_path / "runs" / "mine.tar.xz").exists()


def test_the_short_names_of_settings_are_on_the_page():
    (said,) = re.findall(r"- A row is called.*?(?=\n- )", (REPOSITORY / "docs/tables.md").read_text(), re.DOTALL)
    assert all(re.search(rf"(?<!\w){name}(?!\w)", said) for name in {*SHORT.values()} - {"data.seed"})
