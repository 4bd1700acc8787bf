"""`python -m adafrugal.data`: prepares ahead of a run, and says what there is."""

import subprocess
import sys

import numpy as np
import pytest

from adafrugal.data import overview


@pytest.fixture
def command(c4_layout, cache_root, tmp_path):
    """A function that runs the command as a process: settings -> what it printed."""

    def run(*arguments):
        own = [f"data.source={c4_layout}", "data.tokenizer.kind=train", "data.tokenizer.name=null", "scale=smoke"]
        places = [f"cache_root={cache_root}", "data.processes=1", "eval.tokens=500"]
        words = [sys.executable, "-m", "adafrugal.data", "data=c4", *own, *places, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return run


def test_the_whole_text_is_prepared_counted_and_shown(command, cache_root):
    done = command("--all", "trainer.sequence_length=32")
    assert done.returncode == 0 and done.stderr == ""
    lines = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    assert lines["documents"] == ["600", "100"]
    assert lines["prepared"] == ["all", "all"]
    assert lines["rows of 32"] == ["600", "100"]
    assert 0 < float(lines["padding"][0].rstrip("%")) < 50
    assert done.stdout.count(" of 32 tokens): ") == 3
    (picture,) = lines["picture"]
    with open(picture) as file:  # noqa: PTH123
        assert "<svg" in file.read(500)
    again = command("--all", "trainer.sequence_length=32")
    assert "preparing" in done.stdout and "preparing" not in again.stdout


def test_a_wrong_setting_or_source_is_one_line_and_exit_code_2(command):
    for wrong, message in (("data.source=/nowhere", "data.source is /nowhere"), ("data.rowz=x", "data.rowz")):
        done = command(wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_the_picture_is_the_same_every_time(tmp_path):
    lengths = np.array([3, 10, 100, 1000, 12])
    for name in ("a.svg", "b.svg"):
        overview.draw(lengths, 64, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    overview.draw(np.empty(0), 64, tmp_path / "none.svg")
