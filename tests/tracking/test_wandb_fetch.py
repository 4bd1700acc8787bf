"""Fetch from W&B, against an answer made by hand: no W&B server was within reach.

`Api().runs` gives the attributes of W&B's documentation (id, name, state, config, summary, scan_history), with the keys
of this project's copies and those that W&B adds.
"""

import json

import pytest
from made import recorded

from adafrugal.reports import records, table
from adafrugal.system.errors import SettingError
from adafrugal.tracking import wandb as copies
from adafrugal.tracking.copying import flat


class Answer:
    """A run as the public API gives it."""

    def __init__(self, record, start, state="finished"):
        self.id, self.name, self.state = f"{record.directory.name}-{start}", record.directory.name, state
        self.config = json.loads(json.dumps(record.config() | {"environment": record.environment()}))
        self.config |= {"_wandb": {"cli_version": "0"}}
        last = flat(record.metrics()[-1])
        ours = flat(record.summary()) if state == "finished" else {}
        self.summary = last | ours | {"_step": 400, "_runtime": 12.5, "_timestamp": 1.7e9, "_wandb": {"runtime": 12}}
        self._lines = record.metrics()

    def scan_history(self):
        for line in reversed(self._lines):
            yield flat(line) | {"_step": line["step"], "_runtime": 1.0, "_timestamp": 1.7e9}


@pytest.fixture
def project(monkeypatch):
    """What a project answers, and the names of the projects asked for; an error answers by being raised."""
    import wandb

    asked, answers = [], []

    class Api:
        def runs(self, path):
            asked.append(path)
            if answers and isinstance(answers[0], Exception):
                raise answers[0]
            return iter(answers)

    monkeypatch.setattr(wandb, "Api", Api)
    return asked, answers


@pytest.fixture
def here(tmp_path):
    """A function that makes a local record of an arm."""
    return lambda arm="adamw", loss=4.5, place="here": recorded(
        tmp_path / place, f"experiments=c4_60m/{arm} scale=mini data=embedded", loss
    )


def test_fetched_records_make_the_same_table(project, here, tmp_path):
    asked, answers = project
    answers += [Answer(here("adamw", 4.5), 1), Answer(here("adafrugal", 4.6), 1)]
    answers.append(Answer(here("frugal", place="other"), 1, state="crashed"))
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


def test_a_run_of_two_starts_is_one_record_and_is_fetched_once(project, here, tmp_path):
    record = here()
    project[1].extend([Answer(record, 1, state="crashed"), Answer(record, 2)])
    (first,) = copies.fetch("team/project", tmp_path / "there")
    before = (first.directory / "metrics.jsonl").stat().st_mtime_ns
    (again,) = copies.fetch("team/project", tmp_path / "there")
    assert (again.directory / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["../../etc", "/etc/x", "..", "a/b", ""])
def test_a_name_from_outside_is_no_path(project, here, tmp_path, name):
    answer = Answer(here(), 1)
    answer.config["environment"]["identity"]["key"] = name
    project[1].append(answer)
    with pytest.raises(SettingError, match="which is no plain name; not fetched"):
        copies.fetch("team/project", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_refusal_is_one_line_that_says_what_to_do(project, tmp_path):
    project[1].append(ValueError("Could not find project team/x\n(permission denied)"))
    with pytest.raises(SettingError, match=r"team/x: Could not find project team/x \(permission denied\); log in"):
        copies.fetch("team/x", tmp_path)
    assert not (tmp_path / "team").exists()
