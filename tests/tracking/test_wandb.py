"""W&B for real, offline: what it was told is read back from its own file."""

import json
import struct
import time

import pytest

from adafrugal.config import WandbTracking
from adafrugal.tracking.record import Record
from adafrugal.tracking.wandb import WandbCopy

LABELS = {"task": "pretrain", "data": "embedded", "model": "llama_3m", "arm": "adafrugal", "seed": 3}


def entries(data):
    """The entries of a .wandb file: LevelDB's log format, blocks of 32 KiB, after seven bytes of W&B's own."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield whole
            whole = b""


def read_back(directory):
    """What an offline run holds: its header, its history and its summary."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    found, until = [], time.monotonic() + 60
    while not any(entry.HasField("exit") for entry in found) and time.monotonic() < until:
        time.sleep(0.1)  # W&B's own process writes the end of the file, also after `finish` has returned
        found = [wandb_internal_pb2.Record.FromString(data) for data in entries(file.read_bytes())]
    header, history, summary = None, [], {}
    for entry in found:
        kind = entry.WhichOneof("record_type")
        if kind == "run":
            header = entry.run
        elif kind == "history":
            items = entry.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif kind == "summary":
            summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.summary.update}
    return header, history, summary


@pytest.fixture
def record(tmp_path):
    record = Record(tmp_path / "run")
    record.begin({"seed": 3, "optimizer": {"lr": 0.001}})
    record.add_event("start", step=0)
    return record


def test_an_offline_copy_holds_metrics_settings_group_and_tags(record):
    warnings = []
    record.add_metrics({"step": 10, "loss": 6.5, "density": 0.25, "seconds": {"forward": 1.5}})
    copy = WandbCopy(WandbTracking(), record, "adafrugal-0123456789", LABELS, warnings.append)
    copy.add_metrics({"step": 20, "loss": 6.0, "density": 0.2, "seconds": {"forward": 1.25}})
    copy.write_summary({"validation_loss": 5.5, "state_bytes": {"end": 77}})
    copy.finish(0)
    assert warnings == []
    header, history, summary = read_back(record.directory)
    assert header.run_group == "pretrain-embedded-llama_3m"
    assert header.display_name == "adafrugal-seed3"
    assert set(header.tags) == {"task:pretrain", "data:embedded", "model:llama_3m", "arm:adafrugal", "seed:3"}
    config = {item.key: json.loads(item.value_json) for item in header.config.update}
    assert config["optimizer"] == {"lr": 0.001}
    assert [(line["loss"], line["seconds/forward"], line["_step"]) for line in history] == [
        (6.5, 1.5, 10), (6.0, 1.25, 20)
    ], "the record so far comes first"  # fmt: skip
    assert summary["validation_loss"] == 5.5
    assert summary["state_bytes/end"] == 77


def test_each_start_is_a_run_of_its_own(record):
    for start in (1, 2):
        WandbCopy(WandbTracking(), record, "adafrugal-0123456789", LABELS, str).finish(0)
        assert len(list(record.directory.glob(f"wandb/offline-run-*adafrugal-0123456789-{start}"))) == 1
        record.add_event("start", step=10)


@pytest.mark.parametrize("broken", ["init", "log"])
def test_any_failure_is_one_warning(record, monkeypatch, broken):
    import wandb

    def fail(*_, **__):
        raise RuntimeError("no login\nand no network")

    warnings = []
    with monkeypatch.context() as patched:
        patched.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
        copy = WandbCopy(WandbTracking(), record, "a-1", LABELS, warnings.append)
        for step in (1, 2):
            copy.add_metrics({"step": step, "loss": 1.0})
        copy.write_summary({})
        copy.finish(0)
    assert len(warnings) == 1
    assert "no login and no network" in warnings[0]
    wandb.finish()


def test_online_without_a_login_is_one_warning_and_no_question(record, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    warnings = []
    copy = WandbCopy(WandbTracking(mode="online"), record, "a-1", LABELS, warnings.append)
    copy.add_metrics({"step": 1, "loss": 1.0})
    copy.finish(0)
    assert len(warnings) == 1
    assert "type `wandb login`, or set tracking.mode=offline" in warnings[0]
