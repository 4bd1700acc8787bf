"""Plain values of what configuration libraries and numpy give: `torch.load(…, weights_only=True)` reads no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def as_plain(value: Any) -> Any:
    """Return a value with numbers, strings, lists, tuples and dicts of Python's own types; others are left alone.

    It converts OmegaConf's lists and dicts, numpy's numbers and arrays, named tuples, and members of enums that are
    numbers or strings.
    """
    if type(value) in (bool, int, float, str):
        return value
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(as_plain, value))
    return [*map(as_plain, value)] if isinstance(value, Sequence) and not isinstance(value, bytes) else value
