import torch

from adafrugal.memory import estimate
from adafrugal.optim import state_bytes


def test_adamws_state_is_what_adamw_keeps():
    model = torch.nn.Linear(7, 5)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    assert estimate.adamw_state_bytes([*model.parameters(), frozen]) == state_bytes(optimizer).total
