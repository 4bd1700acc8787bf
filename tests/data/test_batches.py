import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adafrugal.data.batches import Prefetched, TrainingBatches, permutation, unigram_loss, validation
from adafrugal.data.rows import IGNORED, Batch, Layout, Window
from adafrugal.data.text.sources import Position
from adafrugal.data.tokens.encoding import Shard
from adafrugal.data.tokens.store import StoredSplit
from adafrugal.system.errors import SettingError

LAYOUT = Layout(10, True, False, 1, 0)


def shard(tokens):
    counts = np.ones(len(tokens), dtype=np.uint32)
    return Shard(np.asarray(tokens, dtype=np.uint16), np.array([len(tokens)]), counts, 0, {}, Position())


NUMBERS = shard(np.arange(1001))


@pytest.fixture
def batches(tmp_path):
    """A function that opens the batches of a store, a window for each shard."""

    def make(seed, batch_size, steps, repeat=False, shards=(NUMBERS,)):
        train = StoredSplit(tmp_path / f"{sum(1 for _ in tmp_path.iterdir())}")
        with train.alone():
            train.extend(shards, lambda: False)
        plan = SimpleNamespace(layout=LAYOUT, window=1)
        preparation = SimpleNamespace(train=train, wait=lambda until: until())
        return TrainingBatches(plan, preparation, seed, batch_size, steps, repeat)

    return make


@pytest.mark.parametrize(
    ("size", "key", "first", "checksum"),
    [
        (1, "key", [0], 0),
        (2, "0/0", [1, 0], 0),
        (3, "0/0", [1, 0, 2], 0),
        (5, "0/1", [3, 1, 2, 0, 4], 0),
        (16, "7/2", [4, 10, 12, 3, 11, 9, 15, 6, 0, 8, 7, 1, 5, 14, 2, 13], 0),
        (17, "key", [15, 10, 13, 12, 1, 9, 16, 7, 3, 14, 11, 2, 6, 5, 4, 8, 0], 0),
        (64, "0/0", [10, 42, 11, 23, 21], 2058270871),
        (1000, "0/0", [37, 702, 142, 211, 636], 1413192576),
        (4097, "123/4", [2180, 1589, 499, 2786, 2652], 2044853827),
        (65537, "0/3", [20486, 40909, 36503, 32201, 64252], 1910596071),
        (1 << 20, "1/1", [605098, 913310], None),
    ],
)
def test_a_permutation_reaches_every_number_once_and_never_changes(size, key, first, checksum):
    found = permutation(size, key)
    assert found.dtype == np.int64 and found[: len(first)].tolist() == first
    assert size < 64 or checksum is None or zlib.crc32(found.astype("<i8").tobytes()) == checksum
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permutations_differ_by_key_and_mix():
    orders = [np.arange(500), *(permutation(500, key) for key in ("0/0", "0/1", "1/0"))]
    assert np.abs(np.corrcoef(orders) - np.eye(4)).max() < 0.15


def test_a_batch_depends_on_seed_and_step_alone(batches):
    first, second = batches(1, 4, steps=25), batches(2, 4, steps=25)
    assert not torch.equal(first[7].tokens, second[7].tokens) and not torch.equal(first[7].tokens, first[8].tokens)
    there_and_back = batches(1, 4, steps=25)
    assert all(torch.equal(there_and_back[step].tokens, first[step].tokens) for step in (20, 2))
    in_records = [910, 820, 380, 30, 600, 390, 970, 670]
    assert batches(0, 8, steps=12)[1].tokens[:, 0].tolist() == in_records, "as in the committed records"


def test_a_batch_spans_as_many_windows_as_it_needs(batches):
    sizes = (31, 1, 251, 51)  # one window has no row
    shards = [shard(np.arange(size) + 1000 * i) for i, size in enumerate(sizes)]
    expected = []
    for number in range(12):
        window = Window([shards[number % 4]], LAYOUT)
        expected += window.take(permutation(window.rows, f"5/{number}")).tokens.tolist() if window.rows else []
    found = batches(5, 11, steps=9, repeat=True, shards=shards)
    for step in (1, 2, 3, 4, 5, 6, 7, 8, 2):
        assert found[step].tokens.tolist() == expected[11 * (step - 1) : 11 * step]
    assert batches(5, 11, 9, True, shards)[4].tokens.tolist() == expected[33:44], "entered in the middle"
    with pytest.raises(SettingError, match=r"not one row of trainer.sequence_length \(10\) tokens; shorten"):
        batches(0, 4, steps=26, shards=[shard([1, 2, 3])])


# -- one batch --------------------------------------------------------------------------------------------------------


def test_micro_batches_are_slices_of_the_batch(batches):
    batch = batches(0, 8, steps=5, repeat=True)[3]
    for rows in (1, 2, 3, 8):
        micro = list(batch.split(rows))
        assert torch.equal(torch.cat([p.tokens for p in micro]), batch.tokens)
        assert sum(p.count() for p in micro) == sum(p.real_tokens() for p in micro) == batch.count() == 80


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_processes_share_the_rows_evenly_and_rows_that_fill_up_do_not_count(size):
    found = Shard(NUMBERS.tokens, np.array([5, 1001]), None, 0, {}, Position())
    batch = Layout(10, True, True, 1, 0).rows(found, np.arange(5))
    shares = [batch.share(rank, size) for rank in range(size)]
    assert {len(share.tokens) for share in shares} == {-(-5 // size)}
    for name in ("tokens", "targets", "real", "positions"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares])[:5], getattr(batch, name))
    filled = torch.cat([share.tokens for share in shares])[5:]
    assert torch.equal(filled, batch.tokens[:1].expand_as(filled))
    assert sum(share.count() for share in shares) == batch.count() == 49
    assert sum(share.real_tokens() for share in shares) == batch.real_tokens() == 50
    storages = {share.tokens.untyped_storage().data_ptr() for share in shares}
    assert (storages == {batch.tokens.untyped_storage().data_ptr()}) == (size in (1, 5)), "a view of pinned memory"


def test_memory_is_pinned_on_the_way_to_a_gpu(monkeypatch):
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *device, **how: moved.append((device, how)) or tensor)
    of_step(1).to(torch.device("cuda"))
    assert len(pinned) == 3, "torch leaves memory that is pinned alone"
    assert moved == [((torch.device("cuda"),), {"non_blocking": True})] * 3


# -- prefetching ------------------------------------------------------------------------------------------------------


def of_step(step):
    """A batch whose every number is that of a step."""
    return Batch(*(torch.full((2, 3), step) for _ in range(2)), torch.full((2,), step))


class Slow:
    """Batches that take their time; those made are listed."""

    def __init__(self, seconds=0.0):
        self.made, self._seconds = [], seconds

    def __getitem__(self, step):
        time.sleep(self._seconds)
        if step == 9:
            raise SettingError("no ninth")
        self.made.append(step)
        return of_step(step)


@pytest.fixture
def prefetched(request):
    """A function that prefetches batches; the thread is ended."""

    def make(*arguments, **more):
        request.addfinalizer((found := Prefetched(*arguments, **more)).close)
        return found

    return make


def test_batches_are_made_before_they_are_wanted_and_no_more_than_the_run_has(prefetched):
    slow = Slow()
    found = prefetched(slow, last=4)
    assert found(1).tokens[0, 0] == 1
    deadline = time.monotonic() + 5
    while slow.made != [1, 2, 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.made == [1, 2, 3]
    assert [int(found(step).tokens[0, 0]) for step in (2, 3, 4)] == [2, 3, 4]
    found.close()
    assert slow.made == [1, 2, 3, 4], "each once"


def test_waiting_ends_after_the_given_time_and_an_error_is_raised_where_the_batch_is_wanted(prefetched):
    found = prefetched(Slow(seconds=0.1), last=20)
    assert not found.is_ready(8, timeout=0.02)
    assert found.is_ready(8, timeout=5) and found(8).tokens[0, 0] == 8
    assert found.is_ready(9, timeout=5)
    with pytest.raises(SettingError, match="no ninth"):
        found(9)


@pytest.mark.parametrize("pin", [False, True])
def test_the_thread_pins_each_tensor_once_where_it_is_asked_to_and_computes_the_sums(monkeypatch, prefetched, pin):
    pinned = []

    def pin_memory(tensor):
        pinned.append((id(tensor), threading.current_thread().name[:7]))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    assert prefetched(Slow(), last=1, pin=pin)(1).__dict__["_sums"] == (6, 2)
    assert len(set(pinned)) == len(pinned) == (3 if pin else 0) and {name for _, name in pinned} <= {"batches"}


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_rows_are_spread_over_the_held_out_split_and_the_last_batch_is_filled_up():
    found = validation([NUMBERS], LAYOUT, tokens=75, batch_size=3)
    assert [b.tokens.shape[0] for b in found.batches] == [3, 3, 3]
    firsts = torch.cat([b.tokens for b in found.batches])[:7, 0]
    assert torch.equal(firsts, torch.tensor([0, 14, 28, 42, 57, 71, 85]) * 10)
    last = found.batches[2]
    assert (last.targets[1:] == IGNORED).all() and last.real.tolist() == [10, 0, 0]
    assert torch.equal(last.tokens[1:], last.tokens[[0, 0]])
    assert found.tokens == found.text_bytes == 70, "a byte for each token, here"
    everything = validation([NUMBERS], LAYOUT, tokens=10**9, batch_size=1000)
    assert torch.equal(everything.batches[0].tokens[:100].flatten(), torch.arange(1000))
    assert everything.tokens == everything.text_bytes == everything.batches[0].real_tokens() == 1000


def test_validation_rows_do_not_depend_on_how_much_is_prepared_if_there_is_one():
    shards = [shard(np.arange(101) + 100 * i) for i in range(5)]
    few, many = (validation(some, LAYOUT, tokens=150, batch_size=4) for some in (shards[:2], shards))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(few.batches, many.batches, strict=True))
    with pytest.raises(SettingError, match=r"validation part .* not one row .*data.validation_split.*data.held_out"):
        validation([shard([1, 2])], LAYOUT, tokens=100, batch_size=1)


def test_unigram_loss_is_the_cross_entropy_of_the_frequencies():
    targets = torch.tensor([[0, 1], [2, IGNORED]])
    batch = Batch(torch.zeros_like(targets), targets, torch.tensor([2, 2]))
    loss = unigram_loss([shard([0, 0]), shard([0, 1])], 3, [batch])
    assert loss == pytest.approx(-(np.log(4 / 7) + np.log(2 / 7) + np.log(1 / 7)) / 3)
