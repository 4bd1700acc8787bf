"""From the settings to an optimizer, for every file of conf/optimizer."""

from __future__ import annotations

from dataclasses import asdict

import torch

from adafrugal.config import AdamWSettings, Settings, with_run_length
from adafrugal.optim import Frugal, ParameterGroups


def build(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    """The optimizer that the settings describe, over a model's groups."""
    return _BUILDERS[settings.optimizer.kind](settings, groups)


def _adamw(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    o: AdamWSettings = settings.optimizer
    rates = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    return torch.optim.AdamW([dict(group) for group in groups], **rates, fused=True)


def _frugal(settings: Settings, groups: ParameterGroups) -> torch.optim.Optimizer:
    given = asdict(settings.optimizer)
    del given["kind"]
    for name in ("density", "interval"):
        given[name] = with_run_length(given[name], settings.trainer.steps)
    return Frugal(groups, **given, seed=settings.seed)


_BUILDERS = {"adamw": _adamw, "frugal": _frugal}
