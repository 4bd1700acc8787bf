"""What lowers memory, in the order of what it costs."""

import math
from itertools import pairwise

from adafrugal.memory.estimate import estimate
from adafrugal.memory.savings import cuts

ALL = (
    "model.loss_chunk_rows=256", "trainer.activation_checkpointing=layers", "trainer.micro_batch_size=1",
    "optimizer.state_on=cpu_always_full", "optimizer.state_dtype=int8", "optimizer.density.start=0.05",
    "model.dtype=bfloat16 trainer.precision=bf16 optimizer.stochastic_rounding=true",
)  # fmt: skip


def test_each_lowers_the_estimate_beside_those_before(settings):
    words = ["model.vocabulary_size=2000", "model.hidden_size=64", "trainer.batch_size=16", "optimizer=adafrugal"]
    chosen, _ = settings(*words)
    found = list(cuts(chosen, seconds=math.inf))
    assert [cut.words for cut in found] == [words for words in ALL if words in [cut.words for cut in found]]
    assert {ALL[0], ALL[1], ALL[2], ALL[6]} <= {cut.words for cut in found}
    assert found[0].before == estimate(chosen).peak
    for one, next_one in pairwise(found):
        assert next_one.after.total < 0.99 * next_one.before.total and next_one.before == one.after
    typed, _ = settings(*words, *(word for cut in found for word in cut.words.split()))
    assert estimate(typed).peak == found[-1].after


def test_it_ends_with_what_fits(settings):
    chosen, _ = settings("model.vocabulary_size=2000", "trainer.batch_size=16")
    room = estimate(chosen).peak.total // 2
    found = list(cuts(chosen, room, is_gpu=False, seconds=math.inf))
    assert [cut.after.total <= room for cut in found] == [False] * (len(found) - 1) + [True]
    late = list(cuts(chosen, is_gpu=False, seconds=-1))
    assert {cut.after for cut in late} == {None}
    assert "trainer.micro_batch_size=1" in [cut.words for cut in late]
    assert not any("state_on" in cut.words for cut in late), "it saves nothing on a CPU"


def test_one_row_has_gradients_one_at_a_time(settings):
    one = ["trainer.batch_size=1", "trainer.sequence_length=8", "model.hidden_size=256"]
    chosen, _ = settings(*one, "optimizer=adamw")
    found = [cut.words for cut in cuts(chosen, seconds=math.inf)]
    assert found[0] == "trainer.update_in_backward=true"
    assert not any("micro_batch_size" in words or "optimizer." in words for words in found)
