"""What mypy knows of the library in a user's program: `make lint` checks this file, and nothing runs it."""

from typing import assert_type

import torch

from adafrugal import optim
from adafrugal.optim import Frugal, LinearDecay, LossAware, ParameterGroups, Refresh, UpdateInBackward, split_parameters

model = torch.nn.Linear(2, 2)
groups = split_parameters(model)
optimizer = Frugal(groups, lr=1e-3, density=LinearDecay(0.25, 0.05, steps=1000), interval=LossAware(100, 1000))
assert_type(groups, ParameterGroups)
assert_type(optimizer.density, float)
assert_type(optimizer.state_bytes().by_role(), dict[str, int])
UpdateInBackward(optimizer)
Frugal(groups, density="a quarter")  # type: ignore[arg-type]
wrong = optim.no_such_name  # type: ignore[attr-defined]


def on_refresh(refresh: Refresh) -> None:
    assert_type(refresh.bytes_after, int)


optimizer.register_refresh_hook(on_refresh)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
