"""Training batches of a store that is being prepared: which rows, in which order, and how they are waited for."""

from collections import Counter

import numpy as np
import pytest
import torch
from corpora import prepare

from adafrugal.data.batches import TrainingBatches
from adafrugal.data.rows import Layout
from adafrugal.data.tokens.preparation import Preparation
from adafrugal.system.errors import SettingError

BATCH = 7


@pytest.fixture
def open_batches(plan, request):
    """A function that opens the batches of a small corpus: steps, … -> TrainingBatches; `prepared` in this process."""

    def make(steps, repeat=False, prepared=True, **more):
        wanted = plan(**{"rows": steps * BATCH, **more})
        preparation = Preparation(prepare(wanted) if prepared else wanted, str)
        request.addfinalizer(preparation.close)
        return TrainingBatches(wanted, preparation, 3, BATCH, steps, repeat)

    return make


def tokens(batches, first, last):
    return torch.cat([batches[step].tokens for step in range(first, last + 1)])


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_reads_the_windows_in_order_and_every_row_of_them_once_and_the_next_in_another_order(
    open_batches, packed
):
    layout = Layout(16, packed, False, 1, 0)
    whole = open_batches(1, rows=None, layout=layout)
    opened, total = [whole.window(number) for number in range(3)], whole.total()
    assert [len(window.shards) for window in opened] == [2, 2, 1] and sum(w.rows for w in opened) == total
    batches = open_batches(2 * total // BATCH, repeat=True, layout=layout)
    read = tokens(batches, 1, 2 * total // BATCH)
    begin = 0
    for window in opened:
        rows = read[begin : begin + window.rows].tolist()
        in_order = window.take(np.arange(window.rows)).tokens.tolist()
        assert rows != in_order and Counter(map(tuple, rows)) == Counter(map(tuple, in_order))
        begin += window.rows
    first, second = read[:total].tolist(), read[total:].tolist()
    assert first[: len(second)] != second and not Counter(map(tuple, second)) - Counter(map(tuple, first))
    assert batches.epochs(2 * total // BATCH) == 2 * total // BATCH * BATCH / total
    for step in (299 if packed else 99, 1, 50, 51, 20):  # entered at any step
        assert torch.equal(tokens(batches, step, step), read[BATCH * (step - 1) : BATCH * step])


def test_a_broken_file_far_ahead_does_not_end_a_run_before_its_rows_are_wanted(open_batches, c4_layout):
    file = c4_layout / "en" / "c4-train.00009-of-00010.json.gz"
    content = file.read_bytes()
    file.write_bytes(content[:200])
    batches = open_batches(580, prepared=False)
    batches._preparation._helper.process.wait(30)
    assert len(tokens(batches, 1, 400)) == 400 * BATCH
    with pytest.raises(SettingError, match=r"c4-train.00009.* is damaged \(.*\); get the file again"):
        tokens(batches, 401, 580)
    file.write_bytes(content)
    assert len(tokens(open_batches(580), 401, 580)) == 180 * BATCH, "the shards before it stay"


def test_a_run_that_wants_more_than_there_is_stops_when_that_is_known(open_batches):
    batches = open_batches(900, prepared=False)
    with pytest.raises(SettingError, match=r"that takes 6,300 rows and there are [\d,]+, since the text has no more; "):
        tokens(batches, 1, 900)
    with pytest.raises(SettingError, match=r"allowed: up to \d+ steps, or data.repeat=true"):
        open_batches(900)
    steps = batches.total() // BATCH
    assert len(open_batches(steps)[steps].tokens) == BATCH, "all of a complete text is not too much"


def test_a_store_that_reached_its_limit_says_so_and_is_not_repeated(open_batches):
    with pytest.raises(SettingError, match=r"since data.store_limit_gib is reached; "):
        open_batches(300, limit=30_000)
    with pytest.raises(SettingError, match=r"data.store_limit_gib is reached, so that data.repeat would repeat a part"):
        tokens(open_batches(300, repeat=True, limit=30_000), 1, 300)
    assert len(tokens(open_batches(5, repeat=True, limit=30_000), 1, 5)) == 5 * BATCH, "it needs no second epoch"


def test_a_store_is_prepared_only_as_far_as_the_run_reads(open_batches):
    batches = open_batches(10)
    read = tokens(batches, 1, 10)
    assert len(batches._preparation.train.entries) == 2, "one window of two shards"
    more = open_batches(300)
    assert torch.equal(tokens(more, 1, 10), read) and len(more._preparation.train.entries) > 2
