"""Ranges of settings, declared on their fields: `steps: int = at_least(1, 500)`. One function checks all fields.

Null is allowed if the type allows it; composition refuses it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adafrugal.settings.explain import nearest
from adafrugal.system.errors import SettingError

if TYPE_CHECKING:
    from adafrugal.settings.schema import Settings


class Part:
    """A dataclass of settings at a dotted `path`: `class TrainerSettings(Part, path="trainer")`."""

    path: ClassVar[str] = ""
    package: ClassVar[str | None] = None  # import name of a package that only this part needs

    def __init_subclass__(cls, path: str | None = None) -> None:
        cls.path = cls.path if path is None else path

    def check(self, s: Settings) -> None:
        """Refuse values that do not go together; each is within its range already."""

    def canonical(self, s: Settings) -> None:
        """Bring equivalent settings into one form, so that one run has one identity."""

    def need(self, held: bool, name: str, allowed: str | Iterable[str]) -> None:
        """Raise a SettingError about the setting `name` of this part unless `held`."""
        if not held:
            raise SettingError(refusal(f"{self.path}.{name}".lstrip("."), getattr(self, name), allowed))


def parts(part: Part) -> Iterator[Part]:
    """Yield a part and all parts in it."""
    yield part
    for value in vars(part).values():
        if is_dataclass(value):
            yield from parts(value)


def check_ranges(part: Part) -> None:
    """Raise a SettingError about the first value out of its field's range."""
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name == "kind" and not f.metadata:
            other = f"{f.default}, which comes with the file; to choose another write {part.path}=…"
            part.need(value == f.default, f.name, other)
        elif f.metadata and value is not None:
            part.need(f.metadata["holds"](value), f.name, f.metadata["allowed"])


def refusal(name: str, given: Any, allowed: str | Iterable[str]) -> str:
    """Return the message for a wrong value: given and allowed values, with the nearest if these are names."""
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else repr(given)
    words = f"allowed: {allowed}" if isinstance(allowed, str) else nearest(str(given), allowed)
    return f"{name} is {shown}; {words}"


def ranged(default: Any, holds: Callable[[Any], bool], allowed: str | tuple[str, ...]) -> Any:
    """Return a field with a range; `allowed` describes it in words, or lists the allowed names."""
    metadata = {"holds": holds, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(*names: str | None) -> Any:
    """Return a field that takes one of several names, the first by default."""
    return ranged(names[0], names.__contains__, tuple(name or "null" for name in names))


def at_least(low: float, default: float | None, more: str = "") -> Any:
    """Return a field that takes a finite number, `low` or more."""
    return ranged(default, lambda given: is_number(given) and low <= given, f"{low} or more{more}")


def above(low: float, default: float | None, more: str = "") -> Any:
    """Return a field that takes a finite number above `low`."""
    return ranged(default, lambda given: is_number(given) and low < given, f"above {low}{more}")


def within(low: float, high: float, default: float | None, more: str = "") -> Any:
    """Return a field that takes a number from `low` to `high`."""
    return ranged(default, lambda given: low <= given <= high, f"{low} to {high:,}{more}")


def is_number(given: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(given, int | float) and not isinstance(given, bool) and -math.inf < given < math.inf


def near_divisors(number: int, given: int) -> str:
    """Return the five divisors of a number nearest to `given`, in order, as text."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = {*small, *(number // d for d in small)}
    return ", ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - given))[:5]))
