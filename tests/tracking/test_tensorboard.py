"""TensorBoard's file of a run, as TensorBoard itself reads it."""

import os

import pytest

from adafrugal.settings.schema import TensorboardTracking
from adafrugal.tracking.copying import Copy
from adafrugal.tracking.record import Record, read_time

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an extra: make extras"
)


def read_back(directory):
    """What TensorBoard shows of a run: name -> (step, value)."""
    found = accumulator.EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture
def record(tmp_path):
    record = Record(tmp_path / "run")
    record.begin({"seed": 0})
    record.add_event("start", step=0)
    return record


def copied(record, lines, code):
    """Copy lines as a start of the run that ends with an exit code; return the warnings."""
    warnings = []
    copy = Copy(TensorboardTracking(), record, "adamw-0123456789", {}, warnings.append)
    for step, loss in lines:
        record.add_metrics({"step": step, "loss": loss, "elapsed": step / 2, "density": None, "memory": {"peak": step}})
    copy.finish(code)
    return warnings


def test_a_run_that_goes_back_to_its_checkpoint_has_each_step_once(record):
    assert copied(record, [(10, 6.5), (20, 6.0), (30, 5.75)], 75) == []
    record.go_back_to(20)
    record.add_event("start", step=20)
    assert copied(record, [(30, 5.5), (40, 5.25)], 0) == []
    assert len([*record.directory.glob("events.out.tfevents.*")]) == 2
    found = read_back(record.directory)
    assert found["loss"] == [(10, 6.5), (20, 6.0), (30, 5.5), (40, 5.25)]
    assert found["memory/peak"] == [(step, step) for step in (10, 20, 30, 40)]
    assert "density" not in found, "a number that an arm does not have"
    events = accumulator.EventAccumulator(str(record.directory)).Reload().Scalars("loss")
    begun = read_time(record.events()[0]["time"])
    assert [event.wall_time - begun for event in events] == [5, 10, 15, 20], "without the time between two starts"


def test_any_failure_is_one_warning(record, tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise OSError('no space')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (warning,) = copied(record, [(10, 6.5)], 0)
    assert warning == "TensorBoard gets no copy of this run (no space); the record is complete without it"


def test_train_py_writes_it(train):
    done = train("optimizer=adamw", "trainer.steps=4", "eval.tokens=256", tracking="tracking=tensorboard")
    assert done.returncode == 0, done.stderr
    (file,) = train.root.glob("*/*/events.out.tfevents.*")
    record = Record(file.parent)
    found = read_back(record.directory)
    for name in ("loss", "gradient_norm", "validation_loss", "elapsed"):
        numbers = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in record.metrics() if name in line]
        assert found[name] == numbers, name
        assert numbers
