"""Every name, policy and range of the optimizer, without torch; the optimizer and the settings share them.

Ranges of densities and intervals are in `controls`, which needs no torch either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from adafrugal.optim.controls import Control

Part = TypeVar("Part")

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
# kind of state-free rule -> setting -> allowed values, the default first
STATE_FREE: dict[str, dict[str, tuple[Any, ...]]] = {
    "signsgd": {},
    "sgd": {},
    "none": {},
    "whiten": {"steps": (5, *range(1, 5), *range(6, 11))},
    "swan": {"steps": (5, *range(1, 5), *range(6, 11))},
    "sinkhorn": {"rounds": (5, *range(1, 5), *range(6, 11))},
    "rownorm": {},
    "colnorm": {},
}
# how much of a matrix a state-free rule must be given at once, from least to most
SEES = ("nothing", "entries", "rows", "columns", "matrix")
SEEN_BY: dict[str, str] = {
    **dict.fromkeys(("signsgd", "sgd"), "entries"), "none": "nothing", "rownorm": "rows", "colnorm": "columns",
    **dict.fromkeys(("whiten", "swan", "sinkhorn"), "matrix"),
}  # fmt: skip
# option -> allowed names, the default first; None is null in the settings
NAMES: dict[str, tuple[str | None, ...]] = {
    "state_full": ("adamw", "lion", "sgdm"),
    "on_refresh": ("reset", "reset_all", "keep", "keep_overlap"),
    "shrink": ("immediately", "at_refresh"),
    "state_dtype": (None, "float32", "bfloat16", "int8"),
    "state_on": ("device", "cpu_always_full"),
    "nonfinite": (None, "error", "skip"),
}
_IMPOSSIBLE_POLICY = {"blocks": "keep", "svd": "keep_overlap", "random": "keep_overlap"}
# kind of subspace -> allowed policies of on_refresh
POLICIES: dict[str, tuple[str, ...]] = {
    kind: tuple(p for p in NAMES["on_refresh"] if p and p != _IMPOSSIBLE_POLICY.get(kind)) for kind in SUBSPACES
}
TREATMENTS = ("state_full", "split", "state_free", "frozen")  # of a module's weights, from most state to least
ON_SHARDS = "blocks, columns, slab, {kind: svd, side: right}, {kind: random, side: right}"


# classes that `registry` has added to these tables, by option and kind; they check their own settings
OWN: dict[str, dict[str, Callable[..., Any]]] = {"subspace": {}, "state_free": {}}
_KINDS = {"subspace": SUBSPACES, "state_free": STATE_FREE}


_STEPS = ("a whole number of steps, 1 or more", lambda steps: isinstance(steps, int) and steps >= 1)
# option -> its range in words, and a check whether a value is in it
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("lr", "eps", "weight_decay", "split_lr_scale", "state_free_lr_scale"),
        ("0 or more", lambda rate: 0 <= rate < math.inf),
    ),
    "density_scale": ("above 0", lambda scale: 0 < scale < math.inf),
    "betas": ("two numbers from 0 to below 1", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas)),
    "stagger": _STEPS,
}
SCALINGS = ("channel", "tensor")
# the same of options that only baselines have
OF_BASELINES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank": (
        "a number of directions, 1 or more, or a share of a matrix's smaller side above 0, below 1",
        lambda rank: not isinstance(rank, bool) and (0 < rank < 1 or (1 <= rank < math.inf and rank == int(rank))),
    ),
    "interval": _STEPS,
    "growth": ("a finite number, 1 or more", lambda growth: 1 <= growth < math.inf),
    "alpha": ("above 0", lambda alpha: 0 < alpha < math.inf),
    "scaling": (", ".join(SCALINGS), SCALINGS.__contains__),
    "momentum": ("a number from 0 to below 1", lambda share: 0 <= share < 1),
    "dim": ("-1 or 1 for rows, -2 or 0 for columns", (-1, 1, -2, 0).__contains__),
}


def allowed(name: str, value: Any) -> str | None:
    """Return the allowed values of an option, in words, if `value` is not one of them; else None."""
    if name in NAMES:
        return None if value in NAMES[name] else ", ".join(choice or "null" for choice in NAMES[name])
    words, holds = (RANGES | OF_BASELINES)[name]
    try:
        return None if holds(value) else words
    except TypeError:  # no number, or not two
        return words


def allowed_stagger(steps: int, kind: str, interval: Control) -> str | None:
    """Return the allowed values of `stagger`, by subspace and interval, if `steps` is not one; else None."""
    if kind == "blocks":
        return None if steps == 1 else "1 with blocks, which choose among all matrices at once"
    if interval.keeps_gradients:
        why = "whose matrices are compared with their gradients at one step, the refresh"
        return None if steps == 1 else f"1 with the interval {interval.kind}, {why}"
    return None if 1 <= steps <= interval.at(1) else f"1 to the interval ({interval.at(1)})"


def described(value: Any) -> tuple[Any, dict[str, Any]]:
    """Return the kind and the settings of a part that is given as a name, or as a mapping `{"kind": …, …}`."""
    own = dict(value) if isinstance(value, Mapping) else {"kind": value}
    return own.pop("kind", None), own


def made(option: str, value: Any, classes: Mapping[str, type[Part]]) -> Part:
    """Return the part that a name or a mapping describes, one of `classes` by kind.

    Raises:
        ValueError: an unknown kind or setting.
    """
    kind, own = described(value)
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"{option} is {kind!r}; allowed: {', '.join(classes)}, or one of your own (see register)")
    known = [f.name for f in fields(classes[kind])]  # type: ignore[arg-type]
    for name in own:
        if name not in known:
            raise ValueError(f"{option} {kind!r} has no {name!r}; it has {', '.join(known) or 'no settings'}")
    return classes[kind](**own)


def refuse_settings(option: str, kind: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError about the first setting of a subspace or a state-free rule that has no allowed value."""
    for name in _KINDS[option].get(kind, {}):
        if words := allowed_setting(option, kind, name, given[name]):
            raise ValueError(f"{name} is {given[name]!r}; allowed: {words}")


def allowed_setting(option: str, kind: str, name: str, value: Any) -> str | None:
    """Return the allowed values of a setting of a subspace or a state-free rule if `value` is not one; else None."""
    known = _KINDS[option][kind][name]
    if ... in known or (value in known and not isinstance(value, bool | float)):  # True is 1, and 5.0 is 5
        return None
    numbers = sorted(choice for choice in known if isinstance(choice, int))
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"whole numbers, {numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers or known))


def goes_by_entry(sees: str) -> bool:
    """Return whether a state-free rule can be given any part of a tensor of any shape."""
    return sees in SEES[:2]


def goes_by_rows(sees: str) -> bool:
    """Return whether a state-free rule can be given some rows of a matrix, as a process has them."""
    return sees in SEES[:3]


def works_on_shards(kind: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a subspace works on parameters sharded by rows (`ON_SHARDS`)."""
    return kind in ("blocks", "columns", "slab") or settings.get("side") == "right"
