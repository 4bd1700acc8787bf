import json
import math
import resource

import pytest
import torch

from adafrugal.system.errors import SettingError
from adafrugal.system.secrets import hidden
from adafrugal.tracking import environment
from adafrugal.tracking.record import Record


@pytest.fixture
def record(tmp_path):
    found = Record(tmp_path / "run")
    found.begin({"seed": 0, "optimizer": {"kind": "adamw", "betas": (0.9, 0.999)}})
    return found


def append(record, text, names=("metrics.jsonl",)):
    for name in names:
        with (record.directory / name).open("ab") as file:
            file.write(text)


def test_a_record_reads_what_it_wrote(record, tmp_path):
    assert record.status == "created"
    assert record.config() == {"seed": 0, "optimizer": {"kind": "adamw", "betas": [0.9, 0.999]}}
    record.set_status("running", step=3)
    record.add_metrics({"step": 1, "loss": 2.5})
    record.add_event("refresh", step=1)
    record.write_summary({"loss": 2.5})
    again = Record(record.directory)
    assert again.status == "running"
    assert again.metrics() == [{"step": 1, "loss": 2.5}]
    assert again.events()[0]["event"] == "refresh"
    assert again.summary() == {"loss": 2.5}
    none = Record(tmp_path / "none")
    assert (none.status, none.summary(), none.metrics(), none.events()) == (None, None, [], [])


def test_numbers_that_json_lacks_are_strings_in_the_file(record):
    record.add_metrics({"step": 1, "loss": math.inf, "nested": {"x": [math.nan]}})
    line = (record.directory / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {"step": 1, "loss": "inf", "nested": {"x": ["nan"]}}
    assert record.metrics()[0]["loss"] == math.inf


def test_an_existing_run_keeps_its_settings_until_others_are_written(record):
    record.begin({"seed": 1})
    assert record.config()["seed"] == 0
    record.write_config({"seed": 1})
    assert record.config()["seed"] == 1


def test_going_back_drops_later_steps_and_keeps_events_of_the_run_itself(record):
    for step in (10, 20, 30):
        record.add_metrics({"step": step})
        record.add_event("refresh", step=step)
    for event, step in (("interval", 21), ("checkpoint", 20), ("start", 0)):
        record.add_event(event, step=step)
    record.go_back_to(20)
    assert [line["step"] for line in record.metrics()] == [10, 20]
    assert [(e["event"], e["step"]) for e in record.events()] == [
        ("refresh", 10), ("refresh", 20), ("checkpoint", 20), ("start", 0)
    ]  # fmt: skip


def test_half_a_line_is_not_read_and_is_cut_off_before_the_next_is_appended(record):
    record.add_metrics({"step": 1})
    record.add_event("start", step=0)
    append(record, b'{"step": 2, "lo', ("metrics.jsonl", "events.jsonl"))
    assert record.metrics() == [{"step": 1}]
    record.begin({"seed": 0})
    record.add_event("warning", text="damaged")
    record.add_metrics({"step": 3})
    assert [event["event"] for event in record.events()] == ["start", "warning"]
    assert record.metrics() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"\xff\xfe\n", b'{"step": 3, "lo\n{"step": 4}\n', b"[1, 2\n"])
def test_a_damaged_end_behind_the_last_checkpoint_is_dropped(record, damage):
    for step in (1, 2):
        record.add_metrics({"step": step})
    append(record, damage)
    with pytest.raises(SettingError, match=r"metrics\.jsonl is damaged"):
        record.metrics()
    record.go_back_to(2)
    assert record.metrics() == [{"step": 1}, {"step": 2}]


def test_damage_before_the_last_checkpoint_is_an_error(record):
    append(record, b'{"step": 1}\n\0\0\n{"step": 3}\n')
    with pytest.raises(SettingError, match=r"metrics\.jsonl is damaged"):
        record.go_back_to(3)
    record.go_back_to(2)
    assert record.metrics() == [{"step": 1}]


def test_a_disk_that_is_full_from_the_start_is_an_error(tmp_path, monkeypatch):
    record = Record(tmp_path)

    def full(name, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        record.set_status("created")


def test_a_line_of_which_the_disk_takes_a_part_is_removed(record):
    record.add_metrics({"step": 1})
    size, limits = (record.directory / "metrics.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            record.add_metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    record.add_metrics({"step": 3})
    assert record.metrics() == [{"step": 1}, {"step": 3}]


def test_secrets_quoted_by_an_error_are_hidden(record, tmp_path, monkeypatch):
    secret, path = "fake-secret-0123456789", str(tmp_path)
    monkeypatch.setenv("MY_API_KEY", secret)
    monkeypatch.setenv("SSH_KEY", path)  # a path to one is none
    monkeypatch.setenv("TOKEN", "true")
    record.set_status("failed", reason=f"401 for https://host/?key={secret}, see {path}")
    record.add_event("warning", text=f"{secret} is true")
    assert record.reason == f"401 for https://host/?key=***, see {path}"
    assert record.events()[-1]["text"] == "*** is true"
    assert not any(secret in file.read_text() for file in record.directory.iterdir())


def test_the_longer_of_two_secrets_is_hidden_whole_and_one_of_several_lines_too(monkeypatch):
    monkeypatch.setenv("A_KEY", "abcdefgh12")
    monkeypatch.setenv("B_TOKEN", "abcdefgh12-longer")
    monkeypatch.setenv("PRIVATE_KEYS", "-----BEGIN\nabc def\n-----END")
    monkeypatch.setenv("PGPASSWORD", "correct horse")
    assert hidden("abcdefgh12-longer abcdefgh12 -----BEGIN abc def -----END correct horse") == "*** *** *** ***"


def test_the_environment_has_versions_and_no_variables(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "fake-secret-0123456789")
    found = environment.describe()
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["cores"] >= 1
    assert set(found["code"]) == {"commit", "changed"}
    assert "fake-secret" not in json.dumps(found)
