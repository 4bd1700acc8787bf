import pytest

from adafrugal.system import files


def test_one_holds_a_lock_at_a_time(tmp_path):
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock"):
        pass
    with files.locked(tmp_path / "lock"):
        pass


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
