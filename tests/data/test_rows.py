import numpy as np
import pytest

from adafrugal.data.rows import IGNORED, Layout, Window
from adafrugal.data.shards import Shard
from adafrugal.data.sources import Position

END, PAD = 1, 0


def shard(*lengths, with_bytes=True):
    """Documents of those lengths, the end id included, of tokens 10, 11, …; each has as many bytes as its place."""
    ends = np.cumsum(lengths)
    tokens = np.arange(10, 10 + ends[-1]).astype(np.uint16)
    tokens[ends - 1] = END
    counted = np.arange(ends[-1]).astype(np.uint32)
    counted[ends - 1] = 0
    counted = counted if with_bytes else None
    return Shard(tokens, ends, counted, 0, {}, Position())


def test_packed_rows_predict_every_token_but_the_first_once():
    layout, found = Layout(4, True, False, END, PAD), shard(5, 3, 6, 3)
    count = layout.count(4, 17)
    assert count == 4
    rows = [layout.row(found, number) for number in range(count)]
    assert np.array_equal(np.concatenate([row.targets for row in rows]), found.tokens[1:17])
    assert np.array_equal(np.concatenate([row.tokens for row in rows]), found.tokens[:16])
    assert all(row.real == 4 for row in rows)
    assert sum(row.target_bytes for row in rows) == found.token_bytes[1:17].sum()


def test_a_document_is_padded_and_padding_is_no_target():
    layout = Layout(6, False, False, END, PAD)
    row = layout.row(shard(9, 4), 1)
    assert row.tokens.tolist() == [19, 20, 21, END, PAD, PAD]
    assert row.targets.tolist() == [20, 21, END, IGNORED, IGNORED, IGNORED]
    assert row.real == 4
    assert row.target_bytes == 10 + 11


def test_a_long_document_is_cut_and_closed_as_the_papers_loader_does():
    layout = Layout(6, False, False, END, PAD)
    row = layout.row(shard(9, 4), 0)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, END]
    assert row.targets.tolist() == [11, 12, 13, 14, END, IGNORED]
    assert row.real == 6
    assert row.target_bytes == 1 + 2 + 3 + 4, "the end stands for no text, and what was cut off was not predicted"


def test_a_document_as_long_as_the_row_is_whole():
    row = Layout(4, False, False, END, PAD).row(shard(4), 0)
    assert row.tokens.tolist() == [10, 11, 12, END]
    assert row.targets.tolist() == [11, 12, END, IGNORED]


def test_a_document_that_is_nothing_but_its_end_has_no_target():
    row = Layout(4, False, False, END, PAD).row(shard(1), 0)
    assert row.tokens.tolist() == [END, PAD, PAD, PAD]
    assert (row.targets == IGNORED).all()


@pytest.mark.parametrize("lengths", [(5, 3, 6, 3), (4, 4, 4, 4, 1), (17,), (1, 1, 1, 14), (16, 1)])
def test_masked_rows_count_positions_and_targets_anew_in_each_document(lengths):
    layout, found = Layout(4, True, True, END, PAD), shard(*lengths)
    begins = {0, *(int(end) for end in found.ends[:-1])}
    for number in range(layout.count(len(lengths), 17)):
        row = layout.row(found, number)
        for place in range(4):
            there = 4 * number + place
            is_begin = there in begins or place == 0
            assert row.positions[place] == (0 if is_begin else row.positions[place - 1] + 1)
            target = IGNORED if there + 1 in begins else found.tokens[there + 1]
            assert row.targets[place] == target
        predicted = [t for t in range(4 * number + 1, 4 * number + 5) if t not in begins]
        assert row.target_bytes == found.token_bytes[predicted].sum()


def test_real_tokens_are_those_of_the_rows():
    found = shard(9, 4, 1, 20)
    for layout in (Layout(6, False, False, END, PAD), Layout(6, True, False, END, PAD)):
        count = layout.count(len(found.ends), len(found.tokens))
        assert layout.real_tokens(found) == sum(layout.row(found, number).real for number in range(count))


def test_a_window_numbers_the_rows_of_its_shards_one_after_the_other():
    layout, shards = Layout(4, True, False, END, PAD), [shard(9), shard(3), shard(5, 4)]
    window = Window(shards, layout)
    assert window.rows == 2 + 0 + 2
    firsts = [int(window.row(place).tokens[0]) for place in range(4)]
    assert firsts == [10, 14, 10, END]
    assert np.array_equal(window.row(3).tokens, layout.row(shards[2], 1).tokens)


def test_rows_without_counted_bytes_have_none():
    assert Layout(4, True, False, END, PAD).row(shard(9, with_bytes=False), 0).target_bytes == 0
