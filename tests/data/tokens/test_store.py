import json
import os

import numpy as np
import pytest

from adafrugal.data.rows import Layout
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.store import StoredSplit
from adafrugal.system.errors import SettingError


def shard(number, documents=5):
    lengths = np.full(documents, 4)
    tokens = np.full(4 * documents, number, dtype=np.uint16)
    return Shard(tokens, np.cumsum(lengths), None, 100, {"empty": 1}, Position(0, 10 * (number + 1)))


def filled(directory, count, **more):
    part = StoredSplit(directory, **more)
    with part.alone() as alone:
        assert alone
        part.extend((shard(n) for n in range(count)), lambda: False)
    return part


def test_what_was_written_is_read_memory_mapped(tmp_path):
    filled(tmp_path / "train", 3)
    part = StoredSplit(tmp_path / "train")
    assert len(part.entries) == 3 and part.ended and part.is_complete
    for number in range(3):
        found = part.open(number)
        assert isinstance(found.tokens, np.memmap) and found.tokens.dtype == np.uint16
        assert np.array_equal(found.tokens, shard(number).tokens)
        assert np.array_equal(found.ends, shard(number).ends)
        assert (found.text_bytes, found.skipped, found.after) == (100, {"empty": 1}, Position(0, 10 * (number + 1)))
    assert part.position() == Position(0, 30)


def test_a_part_that_is_enough_is_not_ended_and_goes_on_where_it_stopped(tmp_path):
    part = StoredSplit(tmp_path / "train")
    with part.alone():
        part.extend((shard(n) for n in range(9)), lambda: len(part.entries) == 2)
    assert len(part.entries) == 2 and not part.is_complete
    later = StoredSplit(tmp_path / "train")
    with later.alone():
        later.extend((shard(n) for n in range(2, 4)), lambda: False)
    part.refresh()
    assert [int(part.open(n).tokens[0]) for n in range(4)] == [0, 1, 2, 3]
    assert part.ended


def test_a_reader_sees_what_is_added(tmp_path):
    reader, writer = StoredSplit(tmp_path / "train"), StoredSplit(tmp_path / "train")
    seen = []

    def look():
        reader.refresh()
        seen.append(len(reader.entries))
        return False

    with writer.alone():
        writer.extend((shard(n) for n in range(3)), look)
    assert seen == [1, 2, 3]
    reader.refresh()
    assert reader.is_complete


def test_half_a_line_of_the_index_is_never_read_and_is_mended(tmp_path):
    part = StoredSplit(tmp_path / "train")
    with part.alone():
        part.extend((shard(n) for n in range(9)), lambda: len(part.entries) == 2)
    index = tmp_path / "train" / "index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole + whole[: len(whole) // 3])
    later = StoredSplit(tmp_path / "train")
    assert len(later.entries) == 2
    with later.alone():
        later.extend(iter([shard(2)]), lambda: False)
    assert [json.loads(line)["tokens"] for line in index.read_text().splitlines()] == [20, 20, 20]
    assert len(StoredSplit(tmp_path / "train").entries) == 3


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_when_it_is_opened(tmp_path, harm):
    filled(tmp_path / "train", 2)
    file = tmp_path / "train" / "00001.tokens.npy"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-10])
    else:
        file.unlink()
    part = StoredSplit(tmp_path / "train")
    part.open(0)
    with pytest.raises(SettingError, match=r"00001.tokens.npy is damaged.*remove .*the same command prepares it again"):
        part.open(1)


def test_only_one_process_writes(tmp_path):
    first, second = StoredSplit(tmp_path / "train"), StoredSplit(tmp_path / "train")
    with first.alone() as alone, second.alone() as also:
        assert alone and not also
    with second.alone() as alone:
        assert alone


def test_the_limit_ends_a_part_and_a_higher_one_goes_on(tmp_path):
    size = filled(tmp_path / "x", 1).entries[0].size
    part = filled(tmp_path / "train", 9, limit=2 * size + 1)
    assert len(part.entries) == 3 and part.full and not part.ended
    assert not (tmp_path / "train" / "ended").exists()
    more = StoredSplit(tmp_path / "train", limit=10 * size)
    assert not more.is_complete
    with more.alone():
        more.extend((shard(n) for n in range(3, 5)), lambda: False)
    assert more.ended and len(more.entries) == 5
    less = StoredSplit(tmp_path / "train", limit=size)
    assert less.full and len(less.entries) == 1


def test_a_limit_never_cuts_a_window(tmp_path):
    size = filled(tmp_path / "x", 1).entries[0].size
    for limit, count in ((1, 3), (2 * size, 3), (3 * size, 3), (3 * size + 1, 6)):
        part = filled(tmp_path / f"{limit}", 9, limit=limit, window=3)
        assert len(part.entries) == count and part.full


def test_an_index_that_is_damaged_is_named(tmp_path):
    filled(tmp_path / "train", 1)
    (tmp_path / "train" / "index.jsonl").write_text("not json\n")
    with pytest.raises(SettingError, match=r"index.jsonl is damaged; remove "):
        StoredSplit(tmp_path / "train")


def test_rows_are_counted_in_a_range_of_shards(tmp_path):
    split = filled(tmp_path / "train", 5)
    layout = Layout(4, False, False, 1, 0)
    assert split.rows(layout, stop=4) == 4 * 5 and split.rows(layout, 3, 5) == 2 * 5 and split.rows(layout) == 5 * 5


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"cache_root is .*; choose a directory that can be written to"):
        filled(tmp_path / "file" / "below", 1)


def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    part = filled(tmp_path / "before", 1)
    part = StoredSplit(tmp_path / "train")
    with part.alone():
        part.extend((shard(n) for n in range(9)), lambda: len(part.entries) == 1)

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, part.alone():
        broken.setattr(os, "fsync", full)
        with pytest.raises(SettingError, match=r"train is full: make room .*data.store_limit_gib"):
            part.extend(iter([shard(1)]), lambda: False)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        ".lock", "00000.ends.npy", "00000.tokens.npy", "index.jsonl"
    ]  # fmt: skip
    again = StoredSplit(tmp_path / "train")
    assert len(again.entries) == 1 and not again.is_complete
    with again.alone():
        again.extend(iter([shard(1)]), lambda: False)
    assert int(again.open(1).tokens[0]) == 1
