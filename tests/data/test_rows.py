from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adafrugal.data.rows import IGNORED, Layout, Window
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard

END, PAD = 1, 0
NAMES = ("tokens", "targets", "real", "positions")


def shard(*lengths, with_bytes=True):
    """Documents of those lengths, the end id included, of tokens 10, 11, …; a token's bytes are its index."""
    ends = np.cumsum(lengths)
    tokens, counted = np.arange(10, 10 + ends[-1]).astype(np.uint16), np.arange(ends[-1]).astype(np.uint32)
    tokens[ends - 1], counted[ends - 1] = END, 0
    return Shard(tokens, ends, counted if with_bytes else None, 0, {}, Position())


def one(layout, shard, number):
    """One row, as `Layout` makes it."""
    numbers = np.array([number])
    batch = layout.rows(shard, numbers)
    columns = {name: getattr(batch, name)[0].numpy() for name in NAMES if getattr(batch, name) is not None}
    return SimpleNamespace(**columns, target_bytes=layout.target_bytes(shard, numbers)[0])


@pytest.mark.parametrize(
    ("length", "number", "tokens", "targets", "target_bytes"),
    [
        (6, 1, [19, 20, 21, END, PAD, PAD], [20, 21, END], 10 + 11),  # padding is no target
        # cut and closed as the papers' loader does: neither the end nor the text cut off is predicted
        (6, 0, [10, 11, 12, 13, 14, END], [11, 12, 13, 14, END], 1 + 2 + 3 + 4),
        (4, 1, [19, 20, 21, END], [20, 21, END], 10 + 11),  # as long as the row
        (4, 2, [END, PAD, PAD, PAD], [], 0),  # nothing but its end
    ],
)
def test_a_row_is_a_document_cut_or_padded(length, number, tokens, targets, target_bytes):
    row = one(Layout(length, False, False, END, PAD), shard(9, 4, 1), number)
    assert row.tokens.tolist() == tokens
    assert row.targets.tolist() == targets + [IGNORED] * (length - len(targets))
    assert row.real == length - tokens.count(PAD) and row.target_bytes == target_bytes


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
    for index in range(begin, begin + length):
        is_new = index == begin or (layout.masked and index in starts)
        positions.append(0 if is_new else positions[-1] + 1)
        tokens.append(int(shard.tokens[index]))
        is_target = not (layout.masked and index + 1 in starts)
        targets.append(int(shard.tokens[index + 1]) if is_target else IGNORED)
        target_bytes += counted[index + 1] if is_target else 0
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
    every = window.take(np.arange(window.rows))
    assert every.real_tokens() == sum(layout.real_tokens(shard.ends) for shard in shards)
    some = np.random.default_rng(seed).integers(0, len(numbers), 20)
    found = window.take(some)
    expected = [reference(layout, *numbers[number]) for number in some]
    for name in NAMES:
        column = getattr(found, name)
        if name == "positions" and kind != "masked":
            assert column is None
        else:
            assert column.dtype == torch.int64 and column.tolist() == [getattr(row, name) for row in expected]
    assert window.target_bytes(some) == sum(row.target_bytes for row in expected)
    assert [one(layout, *numbers[number]).target_bytes for number in some] == [row.target_bytes for row in expected]


def test_rows_of_a_memory_mapped_shard_are_tensors_of_their_own(tmp_path):
    found = shard(5, 3, 6, 3)
    np.save(tmp_path / "tokens.npy", found.tokens)
    mapped = Shard(np.load(tmp_path / "tokens.npy", mmap_mode="r"), found.ends, None, 0, {}, Position())
    for layout in (Layout(4, True, True, END, PAD), Layout(4, False, False, END, PAD)):
        rows, expected = (layout.rows(one, np.arange(4)) for one in (mapped, found))
        rows.tokens[0, 0] += 0  # a tensor of a map would be read-only, and this a crash
        assert all(torch.equal(getattr(rows, name), getattr(expected, name)) for name in NAMES[:3])
        assert rows.tokens.is_contiguous()
