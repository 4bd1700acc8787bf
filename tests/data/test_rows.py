from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafrugal.data.rows import IGNORED, Layout, Window
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard

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


def one(layout, shard, number):
    """One row, as `Layout` makes it."""
    numbers = np.array([number])
    columns = layout.rows(shard, numbers)._asdict() | {"target_bytes": layout.target_bytes(shard, numbers)}
    return SimpleNamespace(**{name: None if column is None else column[0] for name, column in columns.items()})


def every(layout, shard):
    """All rows of a shard."""
    return layout.rows(shard, np.arange(layout.count(len(shard.ends), len(shard.tokens))))


def test_packed_rows_predict_every_token_but_the_first_once():
    layout, found = Layout(4, True, False, END, PAD), shard(5, 3, 6, 3)
    count = layout.count(4, 17)
    assert count == 4
    rows = every(layout, found)
    assert np.array_equal(rows.targets.flatten(), found.tokens[1:17])
    assert np.array_equal(rows.tokens.flatten(), found.tokens[:16])
    assert rows.real.tolist() == [4] * 4
    assert layout.target_bytes(found, np.arange(count)).sum() == found.token_bytes[1:17].sum()


def test_a_document_is_padded_and_padding_is_no_target():
    layout = Layout(6, False, False, END, PAD)
    row = one(layout, shard(9, 4), 1)
    assert row.tokens.tolist() == [19, 20, 21, END, PAD, PAD]
    assert row.targets.tolist() == [20, 21, END, IGNORED, IGNORED, IGNORED]
    assert row.real == 4
    assert row.target_bytes == 10 + 11


def test_a_long_document_is_cut_and_closed_as_the_papers_loader_does():
    layout = Layout(6, False, False, END, PAD)
    row = one(layout, shard(9, 4), 0)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, END]
    assert row.targets.tolist() == [11, 12, 13, 14, END, IGNORED]
    assert row.real == 6
    assert row.target_bytes == 1 + 2 + 3 + 4, "the end stands for no text, and what was cut off was not predicted"


def test_a_document_as_long_as_the_row_is_whole():
    row = one(Layout(4, False, False, END, PAD), shard(4), 0)
    assert row.tokens.tolist() == [10, 11, 12, END]
    assert row.targets.tolist() == [11, 12, END, IGNORED]


def test_a_document_that_is_nothing_but_its_end_has_no_target():
    row = one(Layout(4, False, False, END, PAD), shard(1), 0)
    assert row.tokens.tolist() == [END, PAD, PAD, PAD]
    assert (row.targets == IGNORED).all()


@pytest.mark.parametrize("lengths", [(5, 3, 6, 3), (4, 4, 4, 4, 1), (17,), (1, 1, 1, 14), (16, 1)])
def test_masked_rows_count_positions_and_targets_anew_in_each_document(lengths):
    layout, found = Layout(4, True, True, END, PAD), shard(*lengths)
    begins = {0, *(int(end) for end in found.ends[:-1])}
    for number in range(layout.count(len(lengths), 17)):
        row = one(layout, found, number)
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
        assert layout.real_tokens(found) == every(layout, found).real.sum()


def reference(layout, shard, number):
    """One row, made in the plain way."""
    length = layout.length
    counted = shard.token_bytes.astype(np.int64) if shard.token_bytes is not None else np.zeros(len(shard.tokens), int)
    if not layout.packed:
        begin = shard.ends[number - 1] if number else 0
        real = min(int(shard.ends[number] - begin), length)
        ids = [*shard.tokens[begin : begin + real - 1].tolist(), layout.end]
        tokens = ids + [layout.pad] * (length - real)
        targets = ids[1:] + [IGNORED] * (length - real + 1)
        target_bytes = counted[begin + 1 : begin + real - 1].sum()
        return SimpleNamespace(tokens=tokens, targets=targets, real=real, positions=None, target_bytes=target_bytes)
    begin = number * length
    starts, tokens, targets, positions, target_bytes = {0, *shard.ends.tolist()}, [], [], [], 0
    for place in range(begin, begin + length):
        is_new = place == begin or (layout.masked and place in starts)
        positions.append(0 if is_new else positions[-1] + 1)
        tokens.append(int(shard.tokens[place]))
        is_target = not (layout.masked and place + 1 in starts)
        targets.append(int(shard.tokens[place + 1]) if is_target else IGNORED)
        target_bytes += counted[place + 1] if is_target else 0
    return SimpleNamespace(
        tokens=tokens, targets=targets, real=length, positions=positions if layout.masked else None,
        target_bytes=target_bytes,
    )  # fmt: skip


def random_shard(lengths, seed, with_bytes):
    """Documents of those lengths with random tokens and random bytes for each, the ends' included."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    tokens = rng.integers(0, 300, ends[-1]).astype(np.uint16)
    tokens[ends - 1] = END
    token_bytes = rng.integers(0, 9, ends[-1]).astype(np.uint32) if with_bytes else None
    return Shard(tokens, ends, token_bytes, 0, {}, Position())


@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=4),
    length=st.integers(1, 12),
    kind=st.sampled_from(["packed", "masked", "document"]),
    with_bytes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_many_rows_of_a_window_are_those_made_one_by_one(lengths, length, kind, with_bytes, seed):
    layout = Layout(length, kind != "document", kind == "masked", END, PAD)
    shards = [random_shard(one, seed + i, with_bytes) for i, one in enumerate(lengths)]
    numbers = [(s, n) for s in shards for n in range(layout.count(len(s.ends), len(s.tokens)))]
    window = Window(shards, layout)
    assert window.rows == len(numbers)
    if not numbers:
        return
    places = np.random.default_rng(seed).integers(0, len(numbers), 20)
    found = window.take(places)
    expected = [reference(layout, *numbers[place]) for place in places]
    for name in ("tokens", "targets", "real", "positions"):
        column = getattr(found, name)
        if name == "positions" and kind != "masked":
            assert column is None
        else:
            assert column.dtype == np.int64 and column.tolist() == [getattr(row, name) for row in expected]
    assert window.target_bytes(places) == sum(row.target_bytes for row in expected)
    assert [one(layout, *numbers[place]).target_bytes for place in places] == [row.target_bytes for row in expected]


def test_a_row_of_a_memory_mapped_shard_is_an_array_of_its_own(tmp_path):
    found = shard(5, 3, 6, 3)
    np.save(tmp_path / "tokens.npy", found.tokens)
    np.save(tmp_path / "ends.npy", found.ends)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("tokens", "ends")]
    for layout in (Layout(4, True, True, END, PAD), Layout(4, False, False, END, PAD)):
        rows = every(layout, Shard(*mapped, None, 0, {}, Position()))
        for column, expected in zip(rows, every(layout, found), strict=True):
            assert np.array_equal(column, expected)
            assert column is None or type(column) is np.ndarray
            assert column is None or (column.flags.writeable and column.flags.c_contiguous)


def test_a_window_numbers_the_rows_of_its_shards_one_after_the_other():
    layout, shards = Layout(4, True, False, END, PAD), [shard(9), shard(3), shard(5, 4)]
    window = Window(shards, layout)
    assert window.rows == 2 + 0 + 2
    rows = window.take(np.arange(4))
    assert rows.tokens[:, 0].tolist() == [10, 14, 10, END]
    assert np.array_equal(rows.tokens[3], one(layout, shards[2], 1).tokens)


def test_rows_without_counted_bytes_have_none():
    assert one(Layout(4, True, False, END, PAD), shard(9, with_bytes=False), 0).target_bytes == 0
