"""The FRUGAL family of optimizers: AdamW state for a share ρ of each matrix's entries, signSGD for the rest.

Needs torch and nothing else of this project. Names are imported when first used, so that
`adafrugal.optim.controls`, which knows no tensors, can be read without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafrugal.optim.accounting import StateBytes, state_bytes
    from adafrugal.optim.combined import Several
    from adafrugal.optim.controls import Constant, CosineDecay, LinearDecay, LossAware
    from adafrugal.optim.frugal import Frugal
    from adafrugal.optim.groups import ParameterGroups, Rule, default_rules, split_parameters
    from adafrugal.optim.in_backward import UpdateInBackward
    from adafrugal.optim.refresh import Refresh
    from adafrugal.optim.subspaces import SVD, Blocks, Columns, RandK, Random, RandPerm, Rows, Slab

_HOME = {
    "Blocks": "subspaces",
    "Columns": "subspaces",
    "Constant": "controls",
    "CosineDecay": "controls",
    "Frugal": "frugal",
    "LinearDecay": "controls",
    "LossAware": "controls",
    "ParameterGroups": "groups",
    "RandK": "subspaces",
    "RandPerm": "subspaces",
    "Random": "subspaces",
    "Refresh": "refresh",
    "Rows": "subspaces",
    "Rule": "groups",
    "SVD": "subspaces",
    "Several": "combined",
    "Slab": "subspaces",
    "StateBytes": "accounting",
    "UpdateInBackward": "in_backward",
    "default_rules": "groups",
    "split_parameters": "groups",
    "state_bytes": "accounting",
}

__all__ = [
    "SVD",
    "Blocks",
    "Columns",
    "Constant",
    "CosineDecay",
    "Frugal",
    "LinearDecay",
    "LossAware",
    "ParameterGroups",
    "RandK",
    "RandPerm",
    "Random",
    "Refresh",
    "Rows",
    "Rule",
    "Several",
    "Slab",
    "StateBytes",
    "UpdateInBackward",
    "default_rules",
    "split_parameters",
    "state_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
