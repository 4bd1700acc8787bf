"""How a run ends: what is noted and raised, and when."""

import contextlib
import errno
import os
import signal
import time

import pytest
import torch

from adafrugal.settings.identity import identify
from adafrugal.system.errors import DONE, FAILED, INTERRUPTED, WRONG, RunError, SettingError, TrainingError
from adafrugal.system.signals import Stop
from adafrugal.tracking.record import Record
from adafrugal.training import failure, session
from adafrugal.training.distributed.ranks import LostError, Ranks
from adafrugal.training.run import Run


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (SettingError("x is 1;\nallowed: 2"), (WRONG, "x is 1; allowed: 2", "error: x is 1; allowed: 2", True)),
        (RunError("x is damaged"), (WRONG, "x is damaged", "error: x is damaged")),
        (TrainingError("no room"), (FAILED, "no room", "error: no room")),
        (LostError("gone", is_told=False), (FAILED, "gone", "error: gone")),
        (LostError("process 1: no room", is_told=True), (FAILED, "process 1: no room", "")),
        (KeyError("x"), (FAILED, "KeyError: 'x'", "KeyError: 'x'")),
        (KeyboardInterrupt(), (INTERRUPTED, "", "interrupted; the same command continues")),
    ],
)
def test_an_error_becomes_a_code_a_reason_and_a_line(error, end):
    assert failure.classify(error) == failure.End(*end)


def test_a_defect_is_shown_with_its_traceback():
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert failure.classify(caught.value).text.startswith("Traceback (most recent call last)")


@pytest.fixture
def explained(settings, tmp_path):
    return lambda error, stop=Stop(): failure.explained(error, stop, Ranks(), settings()[0], tmp_path)  # noqa: B008


def test_disk_and_memory_are_explained(explained):
    full = explained(OSError(errno.ENOSPC, "No space left", "/disk/x"))
    assert str(full).startswith("/disk/x: No space left; complete checkpoints stay")
    assert str(explained(MemoryError())).startswith("memory was refused")
    no_file = FileNotFoundError(errno.ENOENT, "no such file")
    for error in (KeyError("x"), no_file, SettingError("x"), KeyboardInterrupt()):
        assert explained(error) is error


def test_an_error_after_a_lost_interruption_is_an_interruption(explained):
    stop = Stop()
    stop.was_lost = True
    assert isinstance(explained(ImportError("half imported"), stop), KeyboardInterrupt)


@pytest.fixture
def status_after(settings, monkeypatch):
    """A function that ends a run while it is set up: what does so, the exception -> the status of the run."""

    def make(set_up, raised):
        monkeypatch.setattr(Run, "_set_up", set_up)
        chosen, choices = settings()
        with pytest.raises(raised):
            session.run(chosen, choices)
        return Record(identify(chosen, choices).directory).status

    return make


@pytest.mark.parametrize(
    ("interrupted", "raised", "status"), [(True, KeyboardInterrupt, "interrupted"), (False, ImportError, "failed")]
)
def test_an_interruption_that_an_import_swallowed_is_one_all_the_same(interrupted, raised, status, status_after):
    """Modules imported by half fail later, with an error of their own. It is noted before anything is waited for."""
    found = []

    def set_up(self, place):
        self.session.ends.callback(lambda: found.append(self.record.status))
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT if interrupted else 0)
        raise ImportError("half imported")

    assert [status_after(set_up, raised)] == found == [status]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["data=text", "data.source=./nowhere.txt"], "data.source is ./nowhere.txt, and there is no such file"),
        (["data=text", "data.source=nowhere/*.txt"], r"data.source is nowhere/\*.txt, which no file matches"),
        (["data=c4", "data.source=nobody/nowhere"], "data.source is nobody/nowhere, but HF_HUB_OFFLINE is set"),
        (["data=rte", "data.source=./nowhere"], "data.source is ./nowhere, and there is no such directory"),
        (["data=rte", "model.name=./nowhere"], "model.name is ./nowhere, and there is no such directory"),
    ],
)
def test_a_name_of_nothing_leaves_no_run_behind(typed, says, settings, finetune_words, tmp_path, monkeypatch):
    """Unless it ran before: then its record stays, and says why it cannot go on."""
    import datasets
    from huggingface_hub import constants

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    words = [word for word in finetune_words() if "data=rte" in typed]
    chosen, choices = settings(*words, *typed)
    with pytest.raises(SettingError, match=says):
        session.run(chosen, choices)
    assert list((tmp_path / "runs").iterdir()) == []
    record = Record(identify(chosen, choices).directory)
    record.begin({})
    record.set_status("interrupted")
    with pytest.raises(SettingError, match=says):
        session.run(chosen, choices)
    assert record.status == "failed" and record.reason.startswith(says.partition(",")[0].replace("\\", ""))


WAITS = """
import pathlib, time
remove = pathlib.Path.rmdir
def last(path):
    if path.name.startswith("adafrugal-"):
        pathlib.Path("waits").touch()
        while not pathlib.Path("goes on").exists():
            time.sleep(0.01)
    remove(path)
pathlib.Path.rmdir = last
"""


def test_a_run_that_begins_as_another_process_gives_it_up_loses_nothing(forks, cache_root, tmp_path):
    words = ["scale=smoke", "tracking=local", f"run_root={tmp_path / 'runs'}", f"cache_root={cache_root}",
             "trainer.steps=2", "trainer.sequence_length=16", "eval.tokens=64", "data=text", "data.held_out=0.5",
             "data.source=corpus.txt", "data.tokenizer.vocabulary_size=300"]  # fmt: skip
    fails = forks.begin(*words, cwd=tmp_path, before=WAITS)
    once(lambda: (tmp_path / "waits").exists())
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{i} gradients of {i * i} norms are clipped." for i in range(99)))
    begins = forks.begin(*words, cwd=tmp_path)
    once(lambda: list((tmp_path / "runs").glob("*/*/status.json")))
    (tmp_path / "goes on").touch()
    assert fails.wait().code == WRONG
    done = begins.wait()
    assert done.code == DONE, done.err
    (status,) = (tmp_path / "runs").glob("*/*/status.json")
    assert Record(status.parent).status == "finished"


def once(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_device_that_is_not_there_leaves_no_run_behind(settings, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SettingError, match="torch finds no GPU"):
        session.run(*settings("trainer.device=cuda"))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("error", "waits"), [(None, True), (ValueError, True), (KeyboardInterrupt, False)])
def test_a_process_that_is_stopped_at_once_waits_for_nothing(error, waits):
    waited = []
    with contextlib.suppress(ValueError, KeyboardInterrupt), contextlib.ExitStack() as ends:
        ends.push(session.unless_at_once(lambda: waited.append(True)))
        if error:
            raise error
    assert bool(waited) is waits
