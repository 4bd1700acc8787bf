"""FLOPs counted from a decoder's shape."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adafrugal.launching.costs import model_flops
from adafrugal.models import flops, llama
from adafrugal.models.loss import TokenNats
from adafrugal.models.recompute import checkpoint_activations


def with_trainer(settings, **changes):
    return replace(settings, trainer=replace(settings.trainer, **changes))


def test_a_run_of_llama_3m_is_counted_by_hand(settings_of):
    """Hidden size 192, intermediate size 512, 4 blocks, vocabulary 4096; 500 steps of 8 rows of 128 tokens."""
    queries_keys_values_output = 4 * 192 * 192
    gate_up_down = 3 * 192 * 512
    scores_and_their_sums = 128 * 192 + 128 * 192
    head = 192 * 4096
    multiply_adds = 4 * (queries_keys_values_output + gate_up_down + scores_and_their_sums) + head
    forward = 2 * multiply_adds
    assert forward == 5_505_024
    training = 500 * 8 * 128 * 3 * forward
    # eval.every is 100, that of the control a twentieth of the run: 20 evaluations of 16,384 tokens
    evaluations = 20 * 16_384 * forward
    assert model_flops(settings_of("model=llama_3m")) == training + evaluations
    # without a control that looks at the loss there are 5; the last may read more
    words = "model=llama_3m", "optimizer=adamw", "eval.last_tokens=65_536"
    assert model_flops(settings_of(*words)) == training + (4 * 16_384 + 65_536) * forward


@pytest.mark.parametrize("words", [(), ("trainer.activation_checkpointing=layers",), ("model.loss_chunk_rows=128",)])
def test_the_count_is_that_of_torch(settings_of, words):
    """Of the operations that the passes make, recomputed ones included; torch counts attention's whole squares, too."""
    settings = settings_of("scale=smoke", "trainer.batch_size=4", *words)
    model = llama.build(settings.model).train()
    llama.attend_causally(model)
    checkpoint_activations(model, settings.trainer.activation_checkpointing)
    chunk = settings.model.loss_chunk_rows
    nats = TokenNats(model, chunk if isinstance(chunk, int) else None)
    tokens = torch.zeros(4, settings.trainer.sequence_length, dtype=torch.int64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        nats(tokens, tokens).backward()
    counted = flops.trained(settings) + flops.recomputed(settings)
    assert counter.get_total_flops() == counted * tokens.numel()


def test_what_is_kept_is_not_counted_again(settings_of):
    settings = settings_of("scale=smoke")
    assert flops.recomputed(settings) == 0
    assert flops.recomputed(with_trainer(settings, activation_checkpointing="selective")) == 0
    once = flops.forward(settings.model, settings.trainer.sequence_length)
    assert flops.recomputed(with_trainer(settings, activation_checkpointing="layers")) < once.blocks
    few = replace(settings, model=replace(settings.model, loss_chunk_rows=64))
    assert flops.recomputed(few) == once.head
    assert flops.recomputed(with_trainer(few, micro_batch_size=1)) == 0  # one chunk holds its 64 rows
