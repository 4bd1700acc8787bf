import math

import pytest
import torch
from tiny import TINY
from transformers import LlamaForCausalLM

from adafrugal.models import llama
from adafrugal.models.loss import TokenNats
from adafrugal.optim import split_parameters
from adafrugal.settings.compose import check

# FACTS: parameters, and those in split matrices; in millions where the papers' table rounds
SHAPES = {
    "llama_9m": (8_995_968, 802_816),
    "llama_20m": (19_548_416, 3_162_112),
    "llama_35m": (35_197_824, 10_616_832),
    "llama_60m": (58.07, 25.30),
    "llama_130m": (134.11, 84.93),
    "llama_350m": (367.97, 302.38),
    "llama_1b": (1339.08, 1207.91),
    "llama_3b": (2685.83, 2521.83),
    "llama_7b": (6738.42, 6476.01),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_papers_numbers_of_parameters(name, composed):
    settings = check(*composed(f"model={name}")).model
    with torch.device("meta"):
        model = llama.build(settings)
    groups = split_parameters(model)
    split = sum(p.numel() for g in groups if g["split"] for _, p in g["params"])
    total = sum(p.numel() for p in model.parameters())
    for counted, published in zip((total, split), SHAPES[name], strict=True):
        assert counted == published if isinstance(published, int) else round(counted / 1e6, 2) == published
    assert sum(len(g["params"]) for g in groups if g["split"]) == 7 * settings.num_hidden_layers
    assert settings.loss_chunk_rows == "auto"


def test_without_a_mask_attention_is_the_same_to_the_bit_and_asks_the_device_nothing(tmp_path):
    tokens = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(1))
    found = []
    for bare in (False, True):
        torch.manual_seed(0)
        model = llama.build(TINY)
        if bare:
            llama.attend_causally(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss = TokenNats(model)(tokens, tokens)
        loss.backward()
        reads = sum(event.name == "aten::_local_scalar_dense" for event in profiler.events())
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        assert (reads == 0) is bare
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_it_is_the_architecture_of_the_papers(model):
    c = model.config
    assert (c.rms_norm_eps, c.initializer_range, c.hidden_act, c.tie_word_embeddings) == (1e-6, 0.02, "silu", False)
    assert (c.pad_token_id, c.eos_token_id, c.bos_token_id) == (0, 1, None)
    assert c._attn_implementation == "sdpa"
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def loss_and_gradients(model, tokens, targets, chunk_rows, bf16):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        nats = TokenNats(model, chunk_rows)(tokens, targets)
    (nats / (targets != -100).sum()).backward()
    return nats, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_the_chunked_loss_is_the_loss(bf16, tolerance, model):
    tokens, targets = torch.randint(0, 300, (2, 4, 16))
    targets[0, 5:] = -100
    whole, gradients = loss_and_gradients(model, tokens, targets, None, bf16)
    for chunk_rows in (1, 17, 64, 1000):
        chunked, others = loss_and_gradients(model, tokens, targets, chunk_rows, bf16)
        assert whole.dtype == chunked.dtype == torch.float32
        assert abs(whole - chunked) / whole < 1e-5
        for a, b in zip(gradients, others, strict=True):
            assert (a - b).norm() <= tolerance * a.norm()


def test_the_loss_is_transformers_own(model):
    tokens = torch.randint(0, 300, (3, 11))
    theirs = model(input_ids=tokens, labels=tokens).loss
    ours = TokenNats(model)(tokens[:, :-1], tokens[:, 1:]) / 30
    torch.testing.assert_close(ours, theirs)
    assert math.isclose(ours.item(), math.log(300), rel_tol=0.05), "random weights know nothing"


def test_with_positions_documents_in_a_row_do_not_see_each_other(model):
    nats = TokenNats(model)
    first, second = torch.randint(2, 50, (1, 5)), torch.randint(2, 50, (1, 7))
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    targets = torch.randint(2, 50, (1, 12))
    targets[0, 4] = -100
    together = nats(row, targets, positions)
    apart = nats(first, targets[:, :5]) + nats(second, targets[:, 5:])
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    assert nats(row, targets).item() != pytest.approx(apart.item(), rel=1e-5)
