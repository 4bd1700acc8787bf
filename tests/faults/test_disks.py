"""A disk that is full, or becomes read-only: a small file system is mounted for it, which needs the right to."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from forks import Forks
from torture import LONG, end_of, record_under

WORDS = ["scale=smoke", "tracking=local", "optimizer=adamw", "checkpoint.every=5", "checkpoint.keep=2"]
MORE = ["trainer.steps=20", "trainer.log_every=1", "checkpoint.best=false", "eval.tokens=256"]
LONG_RUN = ["trainer.steps=200", "trainer.log_every=1", "eval.every=200", "checkpoint.every=20"]


class Disk:
    """A small file system that only its own runs of train.py see, and `root`, by which others see it."""

    def __init__(self, place, cache_root):
        self._place, self._cache_root = place, cache_root
        self._forks = Forks(place, "unshare", "-m")
        self.root = Path(f"/proc/{self._forks.pid}/root{place}/disk")
        (place / "disk").mkdir()

    def sh(self, script):
        """Run a script of the shell in its directory."""
        script = f"cd {self._place}/disk && {script}"
        enter = ["nsenter", "-t", str(self._forks.pid), "-m"]
        subprocess.run([*enter, "sh", "-c", script], check=True, stderr=subprocess.DEVNULL)

    def mount(self, kib):
        self.sh(f"mount -t tmpfs -o size={kib}k small {self._place}/disk")

    def begin(self, *words):
        places = [f"run_root={self._place}/disk", f"cache_root={self._cache_root}"]
        return self._forks.begin(*WORDS, *places, *words)

    def begin_until_a_checkpoint(self, *words):
        begun, until = self.begin(*words), time.monotonic() + 120
        while not list(self.root.glob("*/*/checkpoints/step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        return begun

    def status(self):
        (file,) = self.root.glob("*/*/status.json")
        return json.loads(file.read_text())

    def close(self):
        self._forks.close()


@pytest.fixture(scope="module")
def mounted(tmp_path_factory, cache_root):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    found = Disk(tmp_path_factory.mktemp("mounted"), cache_root)
    yield found
    found.close()


@pytest.fixture
def disk(mounted):
    yield mounted
    mounted.sh(f"cd / && umount {mounted._place}/disk")


def test_a_disk_that_is_full_at_a_checkpoint(disk, forks, cache_root, tmp_path, tally):
    """Room for one, not for two: status failed, the good one stays, and with more room the same command goes on."""
    disk.mount(4000)
    disk.sh("head -c 2500k /dev/zero > filling")
    done = disk.begin(*MORE).wait()
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert done.err.startswith("error: the checkpoint step-")
    assert "No space left on device" in done.err
    assert disk.status()["status"] == "failed"
    assert disk.status()["reason"].startswith("the checkpoint step-")
    assert list(disk.root.glob("*/*/checkpoints/step-*"))
    disk.sh("rm filling")
    assert disk.begin(*MORE).wait().code == 0
    assert [line["step"] for line in record_under(disk.root).metrics()] == list(range(1, 21))
    assert forks(*WORDS, *MORE, f"run_root={tmp_path}", f"cache_root={cache_root}").code == 0
    assert end_of(disk.root) == end_of(tmp_path)
    tally("faults: a full disk")


def ends_failed_and_goes_on(disk, begun, reason, mend):
    """The run ends with one line that holds `reason`; once that is mended, the same command ends it."""
    done = begun.wait()
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert reason in done.err
    assert disk.status()["status"] == "failed"
    disk.sh(mend)
    again = disk.begin(*LONG_RUN).wait()
    assert again.code == 0, again.err
    assert "continuing after step" in again.out
    assert record_under(disk.root).status == "finished"
    return done.err


@pytest.mark.parametrize("room", [0, 4, 24] if LONG else [0])
def test_a_disk_that_is_full_at_a_line_of_the_record(disk, room, tally):
    """Filled to the last byte while the run goes on: there is no room for so much as a status, yet it says failed."""
    disk.mount(20_000)
    begun = disk.begin_until_a_checkpoint(*LONG_RUN)
    disk.sh(f"dd if=/dev/zero of=filling bs=1k 2>/dev/null; truncate -s -{room}k filling")
    ends_failed_and_goes_on(disk, begun, "No space left on device", "rm filling")
    tally("faults: a full disk")


@pytest.mark.skipif(not LONG, reason="make torture: a full disk takes the same way")
def test_a_directory_that_becomes_read_only(disk, tally):
    """The one of the checkpoints, since a lock is held in the run's own."""
    disk.mount(20_000)
    begun = disk.begin_until_a_checkpoint(*LONG_RUN)
    disk.sh("mount --bind */*/checkpoints */*/checkpoints")
    disk.sh("until mount -o remount,bind,ro $PWD/*/*/checkpoints; do sleep 0.05; done")
    error = ends_failed_and_goes_on(disk, begun, "Read-only file system", "umount $PWD/*/*/checkpoints")
    assert error.startswith("error: the checkpoint step-")
    tally("faults: a directory that becomes read-only")
