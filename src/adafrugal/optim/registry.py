"""Names for parts of your own, so that settings, mappings `{"kind": …}` and saved states find them."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from adafrugal.optim import choices, controls, state_free, subspaces
from adafrugal.optim.controls import Control
from adafrugal.optim.state_free import StateFree
from adafrugal.optim.subspaces import Subspace

Part = TypeVar("Part", bound=type)


def register(part: Part, of: str | None = None) -> Part:
    """Let a class of your own be named by its `kind`, in this process; return the class.

    Do it before anything names the kind, such as `adafrugal.train`. A class that is defined anew, as in a notebook,
    takes the place of the one before.

    Args:
        part: a dataclass derived from `StateFree`, `Subspace` or `Control`.
        of: of a control, what it controls: "density" or "interval".

    Raises:
        ValueError: it is none of these, has no kind, or the kind of another class.
    """
    table = _table(part, of)
    kind = getattr(part, "kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"{part.__name__} has no kind; give it one: kind: ClassVar[str] = 'my_name'")
    for other in (controls.DENSITIES, controls.INTERVALS) if issubclass(part, Control) else (table,):
        known = other.get(kind, part)
        if (known.__module__, known.__qualname__) != (part.__module__, part.__qualname__):
            raise ValueError(f"{part.__name__} has the kind {kind!r} of {known.__name__}; give it a kind of its own")
    table[kind] = part
    if issubclass(part, StateFree):
        choices.STATE_FREE[kind], choices.OWN["state_free"][kind] = _settings(part), part
        choices.SEEN_BY[kind] = part.sees
    elif issubclass(part, Subspace):
        choices.SUBSPACES[kind], choices.OWN["subspace"][kind] = _settings(part), part
        choices.POLICIES.setdefault(kind, tuple(name for name in choices.NAMES["on_refresh"] if name))
    return part


def _table(part: type, of: str | None) -> MutableMapping[str, Any]:
    """Return the table of classes for a part."""
    if issubclass(part, Control):
        if of not in ("density", "interval"):
            raise ValueError(f"{part.__name__} is a control of {of!r}; allowed: density, interval")
        return controls.DENSITIES if of == "density" else controls.INTERVALS
    if of is not None or not issubclass(part, StateFree | Subspace):
        needed = "a class derived from StateFree or Subspace, or from Control with of='density' or of='interval'"
        raise ValueError(f"{part.__name__}{'' if of is None else f' of {of}'} cannot be registered; allowed: {needed}")
    return state_free.STATE_FREE if issubclass(part, StateFree) else subspaces.SUBSPACES


def _settings(part: Any) -> dict[str, tuple[Any, ...]]:
    """Return each setting with its default, and with `...` for others, which the class itself checks."""
    return {f.name: (None if f.default is MISSING else f.default, ...) for f in fields(part) if f.init}
