"""`python -m adafrugal.data`: prepares ahead of a run, and reports on it."""

from pathlib import Path

import numpy as np
import pytest

from adafrugal.data import __main__, overview


@pytest.fixture
def command(c4_layout, cache_root, capsys):
    """A function that runs the command in this process: settings -> exit code, stdout, stderr."""

    def run(*arguments):
        own = [f"data.source={c4_layout}", "data.tokenizer.kind=train", "data.tokenizer.name=null", "scale=smoke"]
        own += ["data=c4", f"cache_root={cache_root}", "data.processes=1", "eval.tokens=500"]
        return __main__.main([*own, *arguments]), *capsys.readouterr()

    return run


def test_the_whole_text_is_prepared_counted_and_shown(command):
    settings = ("--all", "trainer.sequence_length=32", "data.tokenizer.vocabulary_size=330")
    code, out, err = command(*settings)
    assert code == 0 and err == ""
    lines = {line[:18].strip(): line[18:].split() for line in out.splitlines()}
    assert lines["documents"] == ["600", "100"]
    assert lines["prepared"] == ["all", "all"]
    assert lines["rows of 32"] == ["600", "100"]
    assert 0 < float(lines["padding"][0].rstrip("%")) < 50
    assert out.count(" of 32 tokens): ") == 3
    assert "<svg" in Path(lines["picture"][0]).read_text()[:500]
    assert "preparing" in out and "preparing" not in command(*settings)[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("data.source=/nowhere", "data.source is /nowhere, and there is no such file or directory"),
        ("data.rowz=x", "data.rowz"),
        ("data.store=false", "data.store is gone: tokens are always kept under cache_root; data.store_limit_gib"),
    ],
)
def test_a_wrong_setting_or_source_is_one_line_and_exit_code_2(command, wrong, message):
    code, _, err = command(wrong)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_picture_is_the_same_every_time(tmp_path):
    lengths = np.array([3, 10, 100, 1000, 12])
    for name in ("a.svg", "b.svg"):
        overview.draw(lengths, 64, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    overview.draw(np.empty(0), 64, tmp_path / "none.svg")
