"""Records in one file: the same bytes for the same records, and every byte back."""

import lzma
import sys

import pytest
from made import recorded

from adafrugal.reports import __main__ as command
from adafrugal.reports import records, table
from adafrugal.system.errors import SettingError

ADAMW = "scale=smoke data=embedded optimizer=adamw"


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        recorded(tmp_path / "runs", ADAMW, seed=seed).add_event("start")
    (tmp_path / "runs" / "checkpoints").mkdir()
    return tmp_path / "runs"


def content(directory):
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def typed(monkeypatch, capsys, *words):
    """The command's exit code and its output."""
    monkeypatch.setattr(sys, "argv", ["reports", *map(str, words)])
    code = command.main()
    found = capsys.readouterr()
    return code, found.out + found.err


def test_packed_records_come_back_byte_for_byte_and_pack_to_the_same_file(runs, tmp_path, monkeypatch, capsys):
    assert typed(monkeypatch, capsys, "--pack", runs) == (0, f"{runs}.tar.xz\n")
    archive, elsewhere = tmp_path / "runs.tar.xz", tmp_path / "elsewhere"
    assert typed(monkeypatch, capsys, "--unpack", archive, elsewhere) == (0, f"2 runs → {elsewhere}\n")
    assert content(elsewhere) == content(runs)
    (tmp_path / "file").write_text("")
    assert typed(monkeypatch, capsys, "--unpack", archive, tmp_path / "file")[0] == 2
    assert len(content(elsewhere)) == 12
    for file in elsewhere.rglob("*.json*"):
        file.chmod(0o600)
    assert records.pack(elsewhere).read_bytes() == archive.read_bytes()


def test_a_table_is_the_same_of_directories_of_archives_and_of_both(runs, tmp_path):
    recorded(runs, "scale=smoke data=embedded optimizer=frugal").set_status("failed")
    text = table.markdown(records.find([runs]))
    archive = records.pack(runs)
    assert table.markdown(records.find([tmp_path])) == text, "a run that is there in both forms counts once"
    runs.rename(tmp_path / "moved")
    for place in (runs, archive):
        assert table.markdown(records.find([place])) == text
        run = records.find([place])[0]
        assert (run.config()["arm"], len(run.metrics()), run.events()[0]["event"]) == ("adamw", 4, "start")


def test_a_file_that_is_no_archive_of_records_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs.tar.xz").write_bytes(lzma.compress(b"nothing"))
    code, text = typed(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert f"{tmp_path}/runs.tar.xz cannot be read" in text
    with pytest.raises(SettingError, match="there are no runs in "):
        records.pack(tmp_path)


def test_where_there_are_no_runs_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    code, text = typed(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert text.startswith(f"error: there are no runs in {tmp_path}; make one with `python train.py`")
