"""Every name, policy and range of the optimizer, without torch; the optimizer and the settings share them.

Ranges of densities and intervals are in `controls`, which needs no torch either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# kind of subspace -> setting -> allowed values, the default first
SUBSPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "blocks": {
        "order": ("descending", "ascending", "mirror", "random"),
        "unit": ("matrix", "layer"),
        "match": ("count", "elements"),
    },
    "columns": {},
    "rows": {},
    "slab": {},
    "randk": {},
    "randperm": {},
    "svd": {
        "side": ("smaller", "left", "right"),
        "svd_method": ("exact", "subspace_iteration"),
        "rounds": (1, 2, 3, 4, 8),
    },
    "random": {"side": ("smaller", "left", "right")},
}
# option -> allowed names, the default first; None is null in the settings
NAMES: dict[str, tuple[str | None, ...]] = {
    "state_full": ("adamw", "lion", "sgdm"),
    "state_free": ("signsgd", "sgd", "none"),
    "on_refresh": ("reset", "reset_all", "keep", "keep_overlap"),
    "shrink": ("immediately", "at_refresh"),
    "state_dtype": (None, "float32", "bfloat16"),
    "nonfinite": (None, "error", "skip"),
}
_IMPOSSIBLE_POLICY = {"blocks": "keep", "svd": "keep_overlap", "random": "keep_overlap"}
# kind of subspace -> allowed policies of on_refresh
POLICIES: dict[str, tuple[str, ...]] = {
    kind: tuple(p for p in NAMES["on_refresh"] if p and p != _IMPOSSIBLE_POLICY.get(kind)) for kind in SUBSPACES
}
TREATMENTS = ("state_full", "split", "state_free", "frozen")  # of a module's weights, from most state to least
ON_SHARDS = "blocks, columns, slab, {kind: svd, side: right}, {kind: random, side: right}"


# option -> its range in words, and a check whether a value is in it
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("lr", "eps", "weight_decay", "split_lr_scale", "state_free_lr_scale"),
        ("0 or more", lambda rate: 0 <= rate < math.inf),
    ),
    "betas": ("two numbers from 0 to below 1", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas)),
    "stagger": ("a whole number of steps, 1 or more", lambda steps: isinstance(steps, int) and steps >= 1),
}


def allowed(name: str, value: Any) -> str | None:
    """Return the allowed values of an option, in words, if `value` is not one of them; else None."""
    if name in RANGES:
        words, holds = RANGES[name]
        return None if holds(value) else words
    return None if value in NAMES[name] else ", ".join(choice or "null" for choice in NAMES[name])


def allowed_stagger(steps: int, kind: str, interval: int) -> str | None:
    """Return the allowed values of `stagger`, by subspace and first interval, if `steps` is not one; else None."""
    if kind == "blocks":
        return None if steps == 1 else "1 with blocks, which choose among all matrices at once"
    return None if 1 <= steps <= interval else f"1 to the interval ({interval})"


def works_on_shards(kind: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a subspace works on parameters sharded by rows (`ON_SHARDS`)."""
    return kind in ("blocks", "columns", "slab") or settings.get("side") == "right"
