"""The way back from W&B, against an answer made by hand in the form that its public API documents.

W&B itself was not within reach: what `Api().runs` gives here has the attributes of its documentation (id, name, state,
config, summary, scan_history), with the keys that this project's copies have and those that W&B adds.
"""

import json

import pytest
from made import recorded

from adafrugal.reports import records, table
from adafrugal.system.errors import SettingError
from adafrugal.tracking import wandb as copies
from adafrugal.tracking.record import Record


class Answer:
    """A run as the public API gives it."""

    def __init__(self, record, start, state="finished"):
        self.id, self.name, self.state = f"{record.directory.name}-{start}", record.directory.name, state
        self.config = json.loads(json.dumps(record.config() | {"environment": record.environment()}))
        self.config |= {"_wandb": {"cli_version": "0"}}
        last = copies._flat(record.metrics()[-1])
        ours = copies._flat(record.summary()) if state == "finished" else {}
        self.summary = last | ours | {"_step": 400, "_runtime": 12.5, "_timestamp": 1.7e9, "_wandb": {"runtime": 12}}
        self._lines = record.metrics()

    def scan_history(self):
        for line in reversed(self._lines):
            yield copies._flat(line) | {"_step": line["step"], "_runtime": 1.0, "_timestamp": 1.7e9}


@pytest.fixture
def project(monkeypatch):
    """A function that puts answers into a project, and the names of the projects that were asked for."""
    import wandb

    asked, answers = [], []

    class Api:
        def runs(self, path):
            asked.append(path)
            return iter(answers)

    monkeypatch.setattr(wandb, "Api", Api)
    return asked, answers


def test_what_comes_back_makes_the_same_table(project, tmp_path):
    asked, answers = project
    for arm, loss in (("adamw", 4.5), ("adafrugal", 4.6)):
        answers.append(
            Answer(recorded(tmp_path / "here", f"experiments=c4_60m/{arm} scale=mini data=embedded", loss), 1)
        )
    interrupted = recorded(tmp_path / "other", "experiments=c4_60m/frugal scale=mini data=embedded", 4.5)
    answers.append(Answer(interrupted, 1, state="crashed"))
    found = copies.fetch("team/project", tmp_path / "there")
    assert asked == ["team/project"]
    local = records.find([tmp_path / "here"])
    assert sorted(table.markdown(found).splitlines()) == sorted(table.markdown(local).splitlines())
    by_name = {record.directory.name: record for record in local}
    for record in found:
        original = by_name[record.directory.name]
        assert record.config() == original.config()
        assert record.environment() == original.environment()
        kept = [{k: v for k, v in line.items() if v is not None} for line in original.metrics()]
        assert record.metrics() == kept
        assert original.summary().items() <= record.summary().items()


def test_a_run_of_two_starts_is_one_record_and_none_is_fetched_twice(project, tmp_path):
    _, answers = project
    record = recorded(tmp_path / "here", "experiments=c4_60m/adamw scale=mini data=embedded", 4.5)
    answers += [Answer(record, 1, state="crashed"), Answer(record, 2)]
    (first,) = copies.fetch("team/project", tmp_path / "there")
    before = (first.directory / "metrics.jsonl").stat().st_mtime_ns
    (again,) = copies.fetch("team/project", tmp_path / "there")
    assert (again.directory / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["../../etc", "/etc/x", "..", "a/b", ""])
def test_a_name_from_outside_leads_nowhere_else(project, tmp_path, name):
    _, answers = project
    answer = Answer(recorded(tmp_path / "here", "experiments=c4_60m/adamw scale=mini data=embedded", 4.5), 1)
    answer.config["environment"]["identity"]["key"] = name
    answers.append(answer)
    with pytest.raises(SettingError, match="which is no name of a run; not fetched"):
        copies.fetch("team/project", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_refusal_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    import wandb

    class Api:
        def runs(self, path):
            raise ValueError(f"Could not find project {path}\n(permission denied)")

    monkeypatch.setattr(wandb, "Api", Api)
    with pytest.raises(SettingError, match=r"team/x: Could not find project team/x \(permission denied\); log in"):
        copies.fetch("team/x", tmp_path)
    assert not Record(tmp_path / "team").directory.exists()
