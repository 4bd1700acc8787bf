"""A disk that is full, or becomes read-only: a small file system is mounted for it, which needs the right to."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from torture import LONG, end_of, record_under

WORDS = ["scale=smoke", "tracking=local", "optimizer=adamw", "checkpoint.every=5", "checkpoint.keep=2"]


@pytest.fixture
def mounted(tmp_path, cache_root):
    """A function that runs a script with a file system of so many KiB at $DISK and train.py as "$@"."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(size, script, *more):
        mount = f"mount -t tmpfs -o size={size}k small {disk}"
        if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this user cannot mount a file system")
        words = [sys.executable, str(REPOSITORY / "train.py"), *WORDS, f"run_root={disk}", f"cache_root={cache_root}"]
        script = f"{mount} || exit; DISK={disk}; {script}; cp -r {disk} {tmp_path}/kept"
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", *words, *more],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
        )

    return run


MORE = ["trainer.steps=20", "trainer.log_every=1", "checkpoint.best=false", "eval.tokens=256"]


@pytest.fixture(scope="module")
def whole(forks, cache_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert forks(*WORDS, *MORE, f"run_root={root}", f"cache_root={cache_root}").code == 0
    return end_of(root)


LONG_RUN = ["trainer.steps=200", "trainer.log_every=1", "eval.every=200", "checkpoint.every=20"]
FIRST_CHECKPOINT = "until ls $DISK/*/*/checkpoints | grep -q step; do sleep 0.05; done 2>/dev/null"
STATUS = "cp $DISK/*/*/status.json status.json; ls $DISK/*/*/checkpoints > checkpoints"


def test_a_disk_that_is_full_at_a_checkpoint(mounted, whole, tmp_path, tally):
    """Room for one, not for two: status failed, the good one stays, and with more room the same command goes on."""
    fill = "head -c 2500k /dev/zero > $DISK/filling"
    done = mounted(4000, f'{fill}; "$@" 2>err; echo $?; {STATUS}; rm $DISK/filling; "$@"; echo $?', *MORE)
    error = (tmp_path / "err").read_text()
    assert error.startswith("error: the checkpoint step-")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert "Traceback" not in done.stderr
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == ["1", "0"], done.stdout + done.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert status["reason"].startswith("the checkpoint step-")
    assert (tmp_path / "checkpoints").read_text().startswith("step-")
    lines = record_under(tmp_path / "kept").metrics()
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert end_of(tmp_path / "kept") == whole
    tally("faults: a full disk")


@pytest.mark.parametrize("room", [0, 4, 24] if LONG else [0])
def test_a_disk_that_is_full_at_a_line_of_the_record(mounted, tmp_path, room, tally):
    """Filled to the last byte while the run goes on: there is no room for so much as a status, yet it says failed."""
    fill = f"dd if=/dev/zero of=$DISK/filling bs=1k 2>/dev/null; truncate -s -{room}k $DISK/filling"
    script = (
        f'("$@" 2>err; echo $? > code) & {FIRST_CHECKPOINT}; {fill}; wait; {STATUS}; rm $DISK/filling; "$@"; echo $?'
    )
    done = mounted(20_000, script, *LONG_RUN)
    assert (tmp_path / "code").read_text() == "1\n"
    error = (tmp_path / "err").read_text()
    assert error.count("\n") == 1, error
    assert "No space left on device" in error
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
    assert record_under(tmp_path / "kept").status == "finished"
    tally("faults: a full disk")


@pytest.mark.skipif(not LONG, reason="make torture: a full disk takes the same way")
def test_a_directory_that_becomes_read_only(mounted, tmp_path, tally):
    """The one of the checkpoints, since a lock is held in the run's own."""
    seal = "D=$(echo $DISK/*/*/checkpoints); mount --bind $D $D; until mount -o remount,bind,ro $D; do sleep 0.05; done"
    script = f'("$@" 2>err; echo $? > code) & {FIRST_CHECKPOINT}; {seal} 2>/dev/null; wait; {STATUS}; '
    script += 'umount $D; "$@"; echo $?'
    done = mounted(20_000, script, *LONG_RUN)
    error = (tmp_path / "err").read_text()
    assert (tmp_path / "code").read_text() == "1\n", error
    assert error.count("\n") == 1, error
    assert error.startswith("error: the checkpoint step-")
    assert "Read-only file system" in error
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
    assert "continuing after step" in done.stdout
    assert record_under(tmp_path / "kept").status == "finished"
    tally("faults: a directory that becomes read-only")
