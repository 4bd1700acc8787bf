"""Small matrices, an optimizer that splits them, and its steps."""

import io

import torch
from torch import nn

from adafrugal.optim import Frugal

SHAPES = [(6, 10), (10, 6), (5, 5), (1, 7), (8, 3), (4, 4), (3, 9), (9, 2)]


def matrices(shapes=SHAPES, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def frugal(params, **settings):
    return Frugal([{"params": params, "split": True}], **settings)


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def stepped(optimizer, steps, params=None):
    """Step with random gradients, the same at each of `steps` for all optimizers over these shapes."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params or parameters(optimizer):
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()
    return optimizer


def events_of(optimizer):
    """The names and steps of all refreshes and shrinks from now on."""
    events = []
    optimizer.register_refresh_hook(lambda event: events.append((event.event, event.step)))
    return events


def saved_and_loaded(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
