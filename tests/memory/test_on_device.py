"""Rows of logits and the micro-batch, chosen by the memory at hand."""

from types import SimpleNamespace

import pytest

from adafrugal.memory import on_device
from adafrugal.memory.estimate import estimate
from adafrugal.memory.trace import Footprint

GIB = 2**30
H100, SMALL_CARD = 80 * GIB, 16 * GIB


@pytest.fixture
def llama_60m(settings):
    """A function that gives the settings of 128 rows of 256 tokens: overrides -> Settings."""
    shape = ["model=llama_60m", "trainer.batch_size=128", "trainer.sequence_length=256", "trainer.precision=bf16"]
    return lambda *more: settings(*shape, *more)[0]


def test_logits_are_made_in_one_piece_where_they_fit_the_budget(llama_60m):
    whole = 128 * 256 * 32_000 * 2  # 1.95 GiB
    assert on_device.chunk_rows(llama_60m(), H100) is None
    rows = on_device.chunk_rows(llama_60m(), SMALL_CARD)
    assert rows * 32_000 * 2 <= SMALL_CARD / 32 < whole
    assert 128 * 256 % rows == 0  # equal pieces
    assert on_device.chunk_rows(llama_60m()) * 32_000 * 2 <= 2**28  # a CPU's
    assert on_device.chunk_rows(llama_60m("trainer.micro_batch_size=4"), SMALL_CARD) is None
    assert on_device.chunk_rows(llama_60m("trainer.precision=fp32"), H100) == 128 * 128  # twice the bytes


def test_each_of_several_processes_counts_its_own_rows(llama_60m):
    large = llama_60m("trainer.batch_size=512")
    assert on_device.chunk_rows(large, H100, processes=4) is None
    assert on_device.chunk_rows(large, H100) is not None
    assert on_device.chunk_rows(llama_60m("trainer.batch_size=512", "trainer.micro_batch_size=256"), H100, 8) is None


@pytest.mark.parametrize("given", [100, None])
def test_a_typed_number_is_taken(llama_60m, given):
    chosen = llama_60m(f"model.loss_chunk_rows={given or 'null'}")
    assert on_device.with_chunks(chosen, SMALL_CARD).model.loss_chunk_rows == given


def test_an_estimate_counts_the_chunks_of_auto(settings):
    words = ["optimizer=adamw", "model.vocabulary_size=300000", "trainer.batch_size=8"]
    rows = on_device.chunk_rows(settings(*words)[0])
    auto, typed, whole = (
        estimate(settings(*words, f"model.loss_chunk_rows={given}")[0]).peak for given in ("auto", rows, "null")
    )
    assert auto == typed
    assert auto.total < whole.total


def test_the_largest_divisor_that_fits_is_found_in_few_estimates(llama_60m, monkeypatch):
    asked = []

    def foretold(settings):
        asked.append(settings.trainer.micro_batch_size)
        return SimpleNamespace(peak=Footprint(GIB, 0, 0, activations=asked[-1] * GIB, temporaries=0, phase="backward"))

    monkeypatch.setattr("adafrugal.memory.estimate.estimate", foretold)
    for free, rows in ((1000, 128), (40, 32), (36, 16), (1.1, 1)):
        asked.clear()
        assert on_device.resolved(llama_60m(), "bf16", H100, int(free * GIB)).trainer.micro_batch_size == rows
        assert len(asked) <= 2
    few = "optimizer=frugal", "optimizer.fit_gib=20"  # of tensors, without what is only reserved
    assert on_device.resolved(llama_60m(*few), "bf16", H100, H100).trainer.micro_batch_size == 16
    whole = "optimizer=frugal", "optimizer.fit_card_gib=19.5"  # 17 of tensors, 0.35 + 1.6 kept beyond them, 0.86
    assert on_device.resolved(llama_60m(*whole), "bf16", H100, H100).trainer.micro_batch_size == 8
