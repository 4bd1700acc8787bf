"""A run reads the same rows from a store and from a stream, from the beginning and from anywhere."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

from adafrugal.data.batches import TrainingBatches
from adafrugal.data.rows import Layout
from adafrugal.data.tokens.windows import StoredWindows, StreamedWindows
from adafrugal.system.errors import SettingError

BATCH = 7
KINDS = {"store": StoredWindows, "stream": StreamedWindows}


@pytest.fixture
def open_batches(plan):
    """A function that opens the batches of a small corpus: kind, steps, … -> TrainingBatches."""
    opened = []

    def make(kind, steps, repeat=False, state=None, **more):
        wanted = plan(**{"streamed": kind == "stream", "rows": steps * BATCH, **more})
        arguments = (wanted, repeat, str) + ((state,) if kind == "stream" else ())
        opened.append(KINDS[kind](*arguments))
        begin = state if kind == "stream" else None
        return TrainingBatches(opened[-1], wanted.layout, 3, BATCH, steps, repeat, begin)

    yield make
    for windows in opened:
        windows.close()


def tokens(batches, first, last):
    return [batches[step].tokens for step in range(first, last + 1)]


def whole_text(open_batches):
    """The rows of the text, all of it prepared."""
    batches = open_batches("store", 1, rows=None)
    while (total := batches._windows.total()) is None:
        time.sleep(0.05)
    return total


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_epoch_reads_every_row_of_every_window_once(open_batches):
    total = whole_text(open_batches)
    steps = total // BATCH
    whole = open_batches("store", steps)
    assert whole._windows.rows(2), "there are at least three windows"
    seen = torch.cat(tokens(whole, 1, steps)).tolist()
    turns = [whole._windows.open(turn) for turn in range(4) if whole._windows.rows(turn)]
    there = [row for window in turns for row in window.take(np.arange(window.rows)).tokens.tolist()]
    assert len(there) == total and total - len(seen) < BATCH
    left = Counter(map(tuple, there)) - Counter(map(tuple, seen))
    assert left.total() == total - len(seen)


def test_rows_are_permuted_within_windows_and_windows_come_in_order(open_batches):
    batches = open_batches("store", 300)
    batches._windows.rows(0)
    first = batches._windows.open(0)
    assert len(first.shards) == 2
    in_order = first.take(np.arange(first.rows)).tokens
    read = torch.cat(tokens(batches, 1, -(-first.rows // BATCH)))[: first.rows].numpy()
    assert not np.array_equal(read, in_order)
    assert sorted(read.tolist()) == sorted(in_order.tolist())


@pytest.mark.parametrize("layout", ["packed", "document"])
def test_a_stream_gives_the_batches_of_the_store(open_batches, layout):
    chosen = Layout(16, layout == "packed", False, 1, 0)
    steps = 300 if layout == "packed" else 80
    stored, streamed = (tokens(open_batches(kind, steps, layout=chosen), 1, steps) for kind in KINDS)
    assert same(stored, streamed)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_stream_goes_on_from_its_state_at_any_step_and_twice_in_a_row(open_batches, repeat):
    steps = 700 if repeat else 560
    uninterrupted = open_batches("stream", steps, repeat)
    read, states = [], []
    for step in range(1, steps + 1):
        read.append(uninterrupted[step].tokens)
        states.append(uninterrupted.state())
    turns = [state["turn"] for state in states]
    assert turns[-1] >= 2
    changes = [step for step in range(1, steps) if turns[step] != turns[step - 1]]
    for step in (changes[-1] - 1, changes[-1], 650) if repeat else (1, changes[0]):
        resumed = open_batches("stream", steps, repeat, state=states[step - 1])
        assert same(tokens(resumed, step + 1, step + 20), read[step : step + 20])
        again = open_batches("stream", steps, repeat, state=resumed.state())
        assert same(tokens(again, step + 21, step + 30), read[step + 20 : step + 30])


def test_a_run_changes_from_the_store_to_a_stream_and_back(open_batches):
    for repeat, steps in ((False, 560), (True, 700)):
        stored = open_batches("store", steps, repeat)
        read, states = [], []
        for step in range(1, steps + 1):
            read.append(stored[step].tokens)
            states.append(stored.state())
        assert states[-1]["turn"] >= 2
        for step in (300, steps - 30):
            streamed = open_batches("stream", steps, repeat, state=states[step - 1])
            assert same(tokens(streamed, step + 1, step + 20), read[step : step + 20])
            again = open_batches("store", steps, repeat)
            assert streamed.state()["turn"] == states[step + 19]["turn"]
            assert same(tokens(again, step + 21, step + 25), read[step + 20 : step + 25])


def test_a_broken_file_ends_a_stream_in_its_turn_after_the_rows_before_it(open_batches, c4_layout):
    expected = tokens(open_batches("store", 150), 1, 150)
    file = c4_layout / "en" / "c4-train.00008-of-00010.json.gz"
    file.write_bytes(file.read_bytes()[:200])
    streamed = open_batches("stream", 580)
    time.sleep(3)  # the preparation is at the broken file long before its rows are wanted
    assert same(tokens(streamed, 1, 150), expected)
    with pytest.raises(SettingError, match=r"c4-train.00008.* is damaged"):
        tokens(streamed, 151, 580)


def test_a_broken_file_far_ahead_does_not_end_a_run_that_reads_from_a_store(open_batches, c4_layout):
    file = c4_layout / "en" / "c4-train.00009-of-00010.json.gz"
    file.write_bytes(file.read_bytes()[:200])
    stored = open_batches("store", 580)
    stored._windows._preparation._process.wait(30)
    assert len(tokens(stored, 1, 400)) == 400
    with pytest.raises(SettingError, match=r"c4-train.00009.* is damaged"):
        tokens(stored, 401, 580)


def test_a_store_is_entered_at_any_step(open_batches):
    read = tokens(open_batches("store", 300), 1, 300)
    other = open_batches("store", 300)
    for step in (299, 1, 150, 151, 20):
        assert torch.equal(other[step].tokens, read[step - 1])


def test_a_repeated_text_is_read_in_another_order(open_batches):
    for kind in KINDS:
        batches = open_batches(kind, 1200, repeat=True)
        read = torch.cat(tokens(batches, 1, 1200)).tolist()
        total = batches._windows.total()
        assert 2 * total < 1200 * BATCH
        first, second = read[:total], read[total : 2 * total]
        assert sorted(first) == sorted(second)
        assert first != second
        assert batches.epochs(1200) == 1200 * BATCH / total


def test_a_run_that_wants_more_than_there_is_stops_when_that_is_known(open_batches):
    batches = open_batches("stream", 900)
    with pytest.raises(SettingError, match=r"that takes 6,300 rows and there are [\d,]+, since the text has no more; "):
        tokens(batches, 1, 900)
    stored = open_batches("store", 900)
    with pytest.raises(SettingError, match=r"allowed: up to \d+ steps, or data.repeat=true"):
        tokens(stored, 1, 900)
    with pytest.raises(SettingError, match=r"data.repeat=true"):
        open_batches("store", 900)


def test_a_run_that_wants_all_of_a_complete_text_is_not_refused(open_batches):
    total = whole_text(open_batches)
    exact = open_batches("store", total // BATCH)
    assert len(exact[total // BATCH].tokens) == BATCH


def test_a_store_that_reached_its_limit_says_so_and_is_not_repeated(open_batches):
    with pytest.raises(SettingError, match=r"since data.store_limit_gib is reached; "):
        tokens(open_batches("store", 300, limit=30_000), 1, 300)
    with pytest.raises(SettingError, match=r"data.store_limit_gib is reached, so that data.repeat would repeat a part"):
        tokens(open_batches("store", 300, repeat=True, limit=30_000), 1, 300)
    assert len(tokens(open_batches("store", 5, repeat=True, limit=30_000), 1, 5)) == 5, "it needs no second epoch"


def test_a_store_is_prepared_only_as_far_as_the_run_reads(open_batches):
    batches = open_batches("store", 10)
    tokens(batches, 1, 10)
    batches._windows._preparation._process.wait(20)
    assert len(batches._windows._part.entries) == 2, "one window of two shards"
    more = open_batches("store", 300)
    assert same(tokens(more, 1, 10), tokens(batches, 1, 10))
    assert len(more._windows._part.entries) >= 2
