import torch

from adafrugal.memory import estimate
from adafrugal.optim import state_bytes


def test_adamws_state_is_what_adamw_keeps():
    model = torch.nn.Linear(7, 5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    assert estimate.adamw_state_bytes(model.parameters()) == state_bytes(optimizer).total


def test_what_is_frozen_counts_since_it_is_compared_with_training_everything():
    model = torch.nn.Linear(7, 5)
    whole = estimate.adamw_state_bytes(model.parameters())
    model.bias.requires_grad_(False)
    assert estimate.adamw_state_bytes(model.parameters()) == whole
