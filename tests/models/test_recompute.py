"""Recomputed activations give the same gradients; tests/memory has what they save."""

import pytest
import torch

from adafrugal.models import encoder, llama
from adafrugal.models.loss import TokenNats
from adafrugal.models.recompute import checkpoint_activations
from adafrugal.settings.schema import EncoderSettings, LlamaSettings
from adafrugal.system.errors import SettingError

WHICH = ("none", "selective", "layers")


def backward_of_a_decoder(which, dtype, autocast):
    torch.manual_seed(0)
    model = llama.build(LlamaSettings(vocabulary_size=300, hidden_size=32, intermediate_size=80, dtype=dtype))
    checkpoint_activations(model.train(), which)
    tokens = torch.randint(300, (4, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        TokenNats(model)(tokens, tokens).backward()
    return model


def backward_of_an_encoder(which, place):
    torch.manual_seed(0)
    model, _, _ = encoder.load(EncoderSettings(name=str(place)), 2)
    checkpoint_activations(model.train(), which)
    torch.manual_seed(1)  # of dropout, which is drawn again as it was
    model(input_ids=torch.arange(24).reshape(2, 12) % 7).logits.square().sum().backward()
    return model


@pytest.mark.parametrize("of", [("float32", False), ("float32", True), ("bfloat16", True), "encoder"])
def test_gradients_are_the_same_to_the_bit(of, tiny_encoder):
    found = []
    for which in WHICH:
        model = backward_of_an_encoder(which, tiny_encoder) if of == "encoder" else backward_of_a_decoder(which, *of)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_a_model_that_cannot_is_refused(tiny_encoder):
    model, _, _ = encoder.load(EncoderSettings(name=str(tiny_encoder)), 2)
    model.supports_gradient_checkpointing = False
    with pytest.raises(SettingError, match="is layers; allowed: none, since Bert"):
        checkpoint_activations(model, "layers")
