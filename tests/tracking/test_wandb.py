"""W&B for real, offline: what it was told is read back from its own file."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adafrugal.settings.schema import WandbTracking
from adafrugal.tracking import wandb as tracking
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
    made = WandbCopy(WandbTracking(), record, "adafrugal-0123456789", LABELS, warnings.append)
    record.add_metrics({"step": 20, "loss": 6.0, "density": 0.2, "seconds": {"forward": 1.25}})
    record.write_summary({"validation_loss": 5.5, "state_bytes": {"end": 77}})
    made.finish(0)
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


@pytest.fixture
def process(monkeypatch):
    """What a copy's process finds when it imports wandb: a function that takes Python for a module -> None."""
    places = []

    def make(code, place):
        (place / "wandb.py").write_text(code)
        places.append(str(place))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))

    return make


BREAKS = {
    "init": "def login(**_): return True\nclass Settings:\n    def __init__(self, **_): pass\n"
    "def init(**_): raise RuntimeError('no login\\nand no network')",
    "log": "class Settings:\n    def __init__(self, **_): pass\n"
    "class Run:\n    def log(self, *_, **__): raise RuntimeError('no login\\nand no network')\n"
    "def init(**_): return Run()",
}


@pytest.mark.parametrize("broken", BREAKS)
def test_any_failure_is_one_warning(record, tmp_path, process, broken, tally):
    process(BREAKS[broken], tmp_path)
    warnings = []
    made = WandbCopy(WandbTracking(), record, "a-1", LABELS, warnings.append)
    for step in (1, 2):
        record.add_metrics({"step": step, "loss": 1.0})
    made.finish(0)
    assert len(warnings) == 1
    assert "no login and no network" in warnings[0]
    tally("faults: W&B raises")


def test_a_copy_whose_process_dies_is_one_warning(record, tmp_path, process, tally):
    process("import os\nos._exit(7)", tmp_path)
    warnings = []
    WandbCopy(WandbTracking(), record, "a-1", LABELS, warnings.append).finish(0)
    assert len(warnings) == 1
    assert "its process ended with 7" in warnings[0]
    tally("faults: W&B's process dies")


def test_a_copy_that_stands_still_is_waited_for_so_long_and_no_longer(record, monkeypatch, tally):
    """Stopped in the middle, with nobody to tell why; a run that goes on does not notice."""
    monkeypatch.setattr(tracking, "SECONDS", 1)
    warnings = []
    made = WandbCopy(WandbTracking(), record, "a-1", LABELS, warnings.append)
    os.kill(made._process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    record.add_metrics({"step": 1, "loss": 1.0})
    made.finish(0)
    assert time.monotonic() - begun < 10
    assert len(warnings) == 1
    assert "has not taken the rest within 1 seconds" in warnings[0]
    tally("faults: W&B stands still")


A_RUN = """
import sys, time
from pathlib import Path
from adafrugal.settings.schema import WandbTracking
from adafrugal.tracking.record import Record
from adafrugal.tracking.wandb import WandbCopy

labels = {"task": "pretrain", "data": "embedded", "model": "llama_3m", "arm": "adafrugal", "seed": 3}
made = WandbCopy(WandbTracking(), Record(Path(sys.argv[1])), "a-1", labels, print)
print(made._process.pid, flush=True)
time.sleep(600)
"""


def test_a_copy_ends_by_itself_when_its_run_is_killed(record):
    record.add_metrics({"step": 1, "loss": 1.0})
    # A run of its own, killed: a pipe that is closed here does not end while the listener's thread reads it.
    run = subprocess.Popen([sys.executable, "-c", A_RUN, str(record.directory)], stdout=subprocess.PIPE, text=True)
    copy = int(run.stdout.readline())
    run.kill()
    run.wait()
    until = time.monotonic() + 60
    while is_alive(copy) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(copy)
    _, history, _ = read_back(record.directory)
    assert [line["_step"] for line in history] == [1]


def is_alive(process):
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_signals_that_everybody_gets_do_not_end_it(record):
    warnings = []
    made = WandbCopy(WandbTracking(), record, "a-1", LABELS, warnings.append)
    until = time.monotonic() + 60
    while not list(record.directory.glob("wandb/offline-run-*")) and time.monotonic() < until:
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(made._process.pid, number)
    record.add_metrics({"step": 1, "loss": 1.0})
    made.finish(75)
    assert warnings == []
    assert [line["_step"] for line in read_back(record.directory)[1]] == [1]


def test_online_without_a_login_is_one_warning_and_no_question(record, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    warnings = []
    made = WandbCopy(WandbTracking(mode="online"), record, "a-1", LABELS, warnings.append)
    record.add_metrics({"step": 1, "loss": 1.0})
    made.finish(0)
    assert len(warnings) == 1
    assert "type `wandb login`, or set tracking.mode=offline" in warnings[0]
