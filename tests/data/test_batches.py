import numpy as np
import pytest
import torch

from adafrugal.config import SettingError
from adafrugal.data.batches import IGNORED, Batch, PackedRows, TrainingBatches, permuted, validation_batches
from adafrugal.data.unigram import unigram_loss

TOKENS = np.arange(1001, dtype=np.uint16)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 100, 1000, 4097])
def test_a_permutation_reaches_every_place_once(size):
    assert sorted(permuted(i, size, "key") for i in range(size)) == list(range(size))


def test_permutations_differ_by_key_and_mix():
    orders = [[permuted(i, 500, key) for i in range(500)] for key in ("0/0", "0/1", "1/0")]
    for order in orders:
        assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.15
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15


def test_rows_predict_every_token_but_the_first_once():
    rows = PackedRows(TOKENS, 10)
    assert rows.count == 100
    batch = rows.batch(list(range(100)))
    assert torch.equal(batch.targets.flatten(), torch.arange(1, 1001))
    assert torch.equal(batch.tokens + 1, batch.targets)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order():
    batches = TrainingBatches(PackedRows(TOKENS, 10), seed=1, batch_size=4, steps=50, repeat=True)
    firsts = [first for step in range(1, 51) for first in batches[step].tokens[:, 0].tolist()]
    first, second = firsts[:100], firsts[100:]
    assert sorted(first) == sorted(second) == list(range(0, 1000, 10))
    assert first != second
    assert batches.epochs(50) == 2.0


def test_a_batch_depends_on_seed_and_step_alone():
    def batch(seed, step):
        return TrainingBatches(PackedRows(TOKENS, 10), seed, 4, steps=25, repeat=False)[step].tokens

    assert torch.equal(batch(1, 7), batch(1, 7))
    assert not torch.equal(batch(1, 7), batch(2, 7))
    assert not torch.equal(batch(1, 7), batch(1, 8))


def test_micro_batches_are_the_batch_in_parts():
    batch = TrainingBatches(PackedRows(TOKENS, 10), 0, 8, steps=5, repeat=True)[3]
    for rows in (1, 2, 8):
        parts = list(batch.split(rows))
        assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
        assert sum(p.count() for p in parts) == batch.count() == 80


def test_a_text_that_is_too_short_says_what_would_do():
    with pytest.raises(SettingError, match=r"trainer.sequence_length is 2000.*1001 tokens"):
        PackedRows(TOKENS, 2000)
    with pytest.raises(SettingError, match=r"up to 25 steps, or data.repeat=true"):
        TrainingBatches(PackedRows(TOKENS, 10), 0, 4, steps=26, repeat=False)


def test_validation_rows_are_spread_over_the_held_out_part_and_the_last_batch_may_be_smaller():
    rows = PackedRows(TOKENS, 10)
    batches = validation_batches(rows, tokens=75, length=10, batch_size=3)
    assert [b.tokens.shape[0] for b in batches] == [3, 3, 1]
    firsts = torch.cat([b.tokens for b in batches])[:, 0]
    assert torch.equal(firsts, torch.tensor([0, 14, 28, 42, 57, 71, 85]) * 10)
    everything = validation_batches(rows, tokens=10**9, length=10, batch_size=1000)
    assert torch.equal(everything[0].tokens.flatten(), torch.arange(1000))


def test_unigram_loss_is_the_cross_entropy_of_the_frequencies():
    train = np.array([0, 0, 0, 1], dtype=np.uint16)
    targets = torch.tensor([[0, 1], [2, IGNORED]])
    loss = unigram_loss(train, 3, [Batch(torch.zeros_like(targets), targets)])
    assert loss == pytest.approx(-(np.log(4 / 7) + np.log(2 / 7) + np.log(1 / 7)) / 3)
