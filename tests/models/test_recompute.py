"""Activations made again in the backward pass give the same gradients; tests/memory has what they save."""

import pytest
import torch

from adafrugal.models import encoder, llama
from adafrugal.models.loss import token_nats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.settings.schema import EncoderSettings, LlamaSettings
from adafrugal.system.errors import SettingError


def backward(which, dtype, autocast):
    torch.manual_seed(0)
    model = llama.build(LlamaSettings(vocabulary_size=500, hidden_size=64, intermediate_size=160, dtype=dtype))
    checkpoint_activations(model.train(), which)
    tokens = torch.randint(500, (4, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        token_nats(model, tokens, tokens).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_gradients_are_the_same_to_the_bit(dtype, autocast):
    plain = backward("none", dtype, autocast)
    for which in ("selective", "layers"):
        again = backward(which, dtype, autocast)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)), which


def test_an_encoder_can_do_so_too(tiny_encoder):
    found = []
    for which in ("none", "selective", "layers"):
        torch.manual_seed(0)
        model, _, _ = encoder.load(EncoderSettings(name=str(tiny_encoder)), 2)
        checkpoint_activations(model.train(), which)
        torch.manual_seed(1)  # of dropout, which is drawn again as it was
        model(input_ids=torch.arange(24).reshape(2, 12) % 7).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_a_model_that_cannot_is_refused(tiny_encoder):
    model, _, _ = encoder.load(EncoderSettings(name=str(tiny_encoder)), 2)
    model.supports_gradient_checkpointing = False
    with pytest.raises(SettingError, match="is layers; allowed: none, since Bert"):
        checkpoint_activations(model, "layers")
