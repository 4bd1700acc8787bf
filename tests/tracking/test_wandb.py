"""W&B for real, offline: what it was told is read back from its own file."""

import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torture import LONG

from adafrugal.settings.schema import WandbTracking
from adafrugal.tracking import copying
from adafrugal.tracking.copying import Copy
from adafrugal.tracking.record import Record

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


def eventually(condition):
    until = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def read_back(directory, start, kind=""):
    """The header, history, summary and axes of an offline run; `kind` precedes the name of one that has a successor."""
    from wandb.proto import wandb_internal_pb2

    (file,) = directory.glob(f"wandb/{kind}offline-run-*-{start}/*.wandb")

    def ended():  # W&B's own process writes the end of the file, also after `finish` has returned
        found = [wandb_internal_pb2.Record.FromString(data) for data in entries(file.read_bytes())]
        return found if any(entry.HasField("exit") for entry in found) else None

    header, history, summary, axes = None, [], {}, {}
    for entry in eventually(ended):
        kind = entry.WhichOneof("record_type")
        if kind == "run":
            header = entry.run
        elif kind == "history":
            items = entry.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif kind == "summary":
            summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.summary.update}
        elif kind == "metric":
            axes[entry.metric.name or entry.metric.glob_name] = entry.metric.step_metric
    return header, history, summary, axes


@pytest.fixture
def record(tmp_path):
    record = Record(tmp_path / "run")
    record.begin({"seed": 3, "optimizer": {"lr": 0.001}})
    record.add_event("start", step=0)
    return record


@pytest.fixture
def copied(record):
    """A function that starts a copy, and the list of its warnings: settings -> copy."""
    warnings = []

    def start(**settings):
        return Copy(WandbTracking(**settings), record, "adafrugal-0123456789", LABELS, warnings.append)

    return start, warnings


def test_each_start_is_an_offline_run_of_its_own_with_metrics_settings_group_and_tags(record, copied):
    """The first is told to stop by the signals that a whole job gets, which must not end it."""
    start, warnings = copied
    record.add_metrics({"step": 10, "loss": 6.5, "density": 0.25, "seconds": {"forward": 1.5}})
    made = start()
    assert eventually(lambda: list(record.directory.glob("wandb/offline-run-*")))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(made._helper.process.pid, number)
    record.add_metrics({"step": 20, "loss": 6.0, "density": 0.2, "seconds": {"forward": 1.25}})
    made.finish(75)
    record.add_event("start", step=20)
    again = start()
    record.write_summary({"validation_loss": 5.5, "state_bytes": {"end": 77}})
    again.finish(0)
    assert warnings == []
    _, first, _, _ = read_back(record.directory, 1, "earlier-")  # which no `wandb sync …/offline-run-*` sends
    header, history, summary, axes = read_back(record.directory, 2)
    assert axes == {"step": "", "*": "step"}
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *record.directory.glob("wandb/offline-run-*")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.findall(r"/run-(\S+)\.wandb", done.stdout + done.stderr) == ["adafrugal-0123456789-2"]
    assert header.run_group == "pretrain-embedded-llama_3m"
    assert header.display_name == "adafrugal seed=3"
    assert set(header.tags) == {"task:pretrain", "data:embedded", "model:llama_3m", "arm:adafrugal", "seed:3"}
    config = {item.key: json.loads(item.value_json) for item in header.config.update}
    assert config["optimizer"] == {"lr": 0.001}
    for lines in (first, history):
        assert [(line["loss"], line["seconds/forward"], line["step"], line["_step"]) for line in lines] == [
            (6.5, 1.5, 10, 10), (6.0, 1.25, 20, 20)
        ]  # fmt: skip
    assert summary["validation_loss"] == 5.5
    assert summary["state_bytes/end"] == 77


SETTINGS = "class Settings:\n    def __init__(self, **_): pass\n"
BREAKS = {  # a module in the place of wandb, and what the warning says
    "log": (
        SETTINGS + "class Run:\n    def define_metric(self, *_, **__): pass\n"
        "    def log(self, *_, **__): raise RuntimeError('no login\\nand no network')\n"
        "def init(**_): return Run()",
        "no login and no network",
    ),
    "process": ("import os\nos._exit(7)", "its process ended with 7"),
    "login": (  # in the long form W&B's own answer
        None if LONG else SETTINGS + "def login(**_): return False",
        "type `wandb login`, or set tracking.mode=offline",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_any_failure_is_one_warning(record, copied, tmp_path, monkeypatch, broken, tally):
    code, said = BREAKS[broken]
    if code:
        (tmp_path / "wandb.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    start, warnings = copied
    made = start(mode="online" if broken == "login" else "offline")
    for step in (1, 2):
        record.add_metrics({"step": step, "loss": 1.0})
    made.finish(0)
    assert len(warnings) == 1
    assert said in warnings[0]
    tally("faults: W&B's process dies" if broken == "process" else "faults: W&B raises")


def test_a_copy_that_hangs_is_waited_for_until_the_limit(record, copied, monkeypatch, tally):
    monkeypatch.setattr(copying, "SECONDS", 1)
    start, warnings = copied
    made = start()
    os.kill(made._helper.process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    record.add_metrics({"step": 1, "loss": 1.0})
    made.finish(0)
    assert time.monotonic() - begun < 10
    assert len(warnings) == 1
    assert "has not taken the rest within 1 seconds" in warnings[0]
    tally("faults: W&B stands still")


def test_names_group_tags_and_axis_are_those_that_are_set(record, copied):
    start, warnings = copied
    record.add_metrics({"step": 10, "tokens": 80, "loss": 6.5})
    start(name="mine", group="ours", tags=["first try"], x_axis="tokens").finish(0)
    header, _, _, axes = read_back(record.directory, 1)
    assert warnings == []
    assert (header.display_name, header.run_group) == ("mine", "ours")
    assert {"first try", "arm:adafrugal"} < set(header.tags)
    assert axes == {"tokens": "", "*": "tokens"}


def test_a_copy_ends_by_itself_when_its_run_is_killed(record, copied):
    record.add_metrics({"step": 1, "loss": 1.0})
    here, there = multiprocessing.Pipe()

    def train():
        there.send(copied[0]()._helper.process.pid)
        time.sleep(600)

    run = multiprocessing.get_context("fork").Process(target=train)  # a pipe closed here would stay open in the thread
    run.start()
    copy = here.recv()
    run.kill()
    run.join()
    assert eventually(lambda: not is_alive(copy))
    assert [line["_step"] for line in read_back(record.directory, 1)[1]] == [1]


def is_alive(process):
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
