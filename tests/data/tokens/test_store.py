import json
import os
from unittest import mock

import numpy as np
import pytest

from adafrugal.data.rows import Layout
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.store import StoredSplit
from adafrugal.system.errors import SettingError


def shard(number):
    tokens = np.full(20, number, dtype=np.uint16)
    return Shard(tokens, np.arange(4, 21, 4), None, 100, {"empty": 1}, Position(0, 10 * (number + 1)))


def extended(split, first, stop, enough=lambda: False):
    with split.alone() as alone:
        assert alone
        split.extend(map(shard, range(first, stop)), enough)
    return split


@pytest.fixture
def train(tmp_path):
    return tmp_path / "train"


def test_written_shards_are_read_memory_mapped(train):
    extended(StoredSplit(train), 0, 3)
    split = StoredSplit(train)
    assert len(split.entries) == 3 and split.ended and split.is_complete
    for number, found in enumerate(split.shards()):
        assert isinstance(found.tokens, np.memmap) and found.tokens.dtype == np.uint16
        expected = shard(number)
        assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.ends, expected.ends)
        assert (found.text_bytes, found.skipped, found.after) == (100, {"empty": 1}, expected.after)
    assert split.position() == Position(0, 30)
    layout = Layout(4, False, False, 1, 0)
    assert split.rows(layout) == 3 * 5 and split.rows(layout, stop=2) == split.rows(layout, 1, 3) == 2 * 5


def test_a_split_goes_on_where_it_stopped_and_a_reader_sees_it_grow(train):
    reader, writer, seen = StoredSplit(train), StoredSplit(train), []

    def look():
        reader.refresh()
        seen.append(len(reader.entries))
        return len(seen) == 2

    with writer.alone() as alone, reader.alone() as also:
        assert alone and not also, "one writes"
    extended(writer, 0, 9, look)
    assert seen == [1, 2] and not writer.is_complete
    extended(StoredSplit(train), 2, 4)
    reader.refresh()
    assert [int(found.tokens[0]) for found in reader.shards()] == [0, 1, 2, 3]
    assert reader.ended


def test_half_a_line_of_the_index_is_never_read_and_is_mended(train):
    extended(split := StoredSplit(train), 0, 9, lambda: len(split.entries) == 2)
    index = train / "index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole + whole[: len(whole) // 3])
    later = StoredSplit(train)
    assert len(later.entries) == 2
    extended(later, 2, 3)
    assert [json.loads(line)["tokens"] for line in index.read_text().splitlines()] == [20, 20, 20]
    assert len(StoredSplit(train).entries) == 3
    index.write_text("not json\n")
    with pytest.raises(SettingError, match=r"index.jsonl is damaged; remove "):
        StoredSplit(train)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_when_it_is_opened(train, harm):
    extended(StoredSplit(train), 0, 2)
    file = train / "00001.tokens.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-10] if harm == "cut" else content[:-3] + b"xx" + content[-1:])
    if harm == "remove":
        file.unlink()
    split = StoredSplit(train)
    split.open(0)
    with pytest.raises(SettingError, match=r"00001.tokens.npy is damaged.*remove .*the same command prepares it again"):
        split.open(1)


def test_the_limit_ends_a_split_and_a_higher_one_goes_on(train, tmp_path):
    size = extended(StoredSplit(tmp_path / "x"), 0, 1).entries[0].size
    split = extended(StoredSplit(train, limit=2 * size + 1), 0, 9)
    assert len(split.entries) == 3 and split.full and not split.ended
    assert not (train / "ended").exists()
    more = StoredSplit(train, limit=10 * size)
    assert not more.is_complete
    extended(more, 3, 5)
    assert more.ended and len(more.entries) == 5
    less = StoredSplit(train, limit=size)
    assert less.full and len(less.entries) == 1
    for limit, count in ((1, 3), (2 * size, 3), (3 * size, 3), (3 * size + 1, 6)):  # it never cuts a window
        split = extended(StoredSplit(tmp_path / f"{limit}", limit=limit, window=3), 0, 9)
        assert len(split.entries) == count and split.full


def test_a_full_disk_is_one_line_and_leaves_nothing_that_is_taken_for_whole(train, tmp_path, monkeypatch):
    extended(split := StoredSplit(train), 0, 9, lambda: len(split.entries) == 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(SettingError, match=r"train is full: make room .*data.store_limit_gib"):
            extended(split, 1, 2)
    again = StoredSplit(train)
    assert len(again.entries) == 1 and not again.is_complete
    assert int(extended(again, 1, 2).open(1).tokens[0]) == 1
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"cache_root is .*; choose a directory that can be written to"):
        extended(StoredSplit(tmp_path / "file" / "below"), 0, 1)
