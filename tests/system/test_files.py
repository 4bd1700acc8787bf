import fcntl
import shutil
from pathlib import Path

import pytest

from adafrugal.system import files


def test_one_holds_a_lock_at_a_time(tmp_path):
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock"):
        pass
    with files.locked(tmp_path / "lock"):
        pass


def is_locked(file):
    """Whether another process could not lock the file of this name."""
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_lock_of_a_file_that_was_just_removed_is_given_up_for_one_of_the_file_there(tmp_path, monkeypatch):
    """By a process that held it, and failed: then a third one may have made the file anew."""
    file, flock, calls = tmp_path / "run" / ".lock", fcntl.flock, []

    def later(opened, how):
        if not calls:
            shutil.rmtree(file.parent)
        calls.append(opened)
        flock(opened, how)

    monkeypatch.setattr(files.fcntl, "flock", later)
    with files.locked(file):
        monkeypatch.undo()
        assert is_locked(file) and len(calls) == 2
    assert not is_locked(file)


def test_a_directory_that_goes_while_its_lock_is_made_is_made_again(tmp_path, monkeypatch):
    file, mkdir, made = tmp_path / "run" / ".lock", Path.mkdir, []

    def at_first_in_vain(path, **how):
        mkdir(path, **how)
        if not made:
            path.rmdir()
        made.append(path)

    monkeypatch.setattr(Path, "mkdir", at_first_in_vain)
    with files.locked(file):
        assert is_locked(file) and len(made) == 2


def test_files_and_directories_are_brought_to_disk(tmp_path):
    with (tmp_path / "file").open("w") as file:
        file.write("text")
        files.to_disk(file)
        assert (tmp_path / "file").read_text() == "text"
    files.to_disk(tmp_path / "file")
    files.to_disk(tmp_path)


def test_a_directory_appears_when_it_is_whole_or_not_at_all(tmp_path):
    place = tmp_path / "above" / "place"
    with pytest.raises(KeyError), files.made(place) as scratch:
        raise KeyError
    assert not place.exists()
    for text in ("first", "second"):  # another process was first: its directory stays
        with files.made(place) as scratch:
            (scratch / "file").write_text(text)
            assert place.exists() is (text == "second")
    assert (place / "file").read_text() == "first"
    assert [path.name for path in place.parent.iterdir()] == ["place"]
