"""Controls: the density ρ and the interval T at a step, without tensors and torch.

A control is a plain number (constant), a mapping `{"kind": …, …}` as `state_dict` returns, or an object;
`density(value)` and `interval(value)` accept all three and check the range.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from adafrugal.optim.values import as_plain

SOURCES = ("validation", "training")


@dataclass
class Control:
    """A number that may change during training.

    Derive a dataclass from it for a control of your own. Its fields are what is saved: settings, and state in fields
    with `init=False`. A control that looks at losses has fields `every`, the steps between two of them, and perhaps
    `source`, "validation" or "training": train.py passes such a loss so often; in your own loop you call `observe`.
    """

    kind: ClassVar[str]
    keeps_gradients: ClassVar[bool] = False  # whether the optimizer keeps what `decide` is told of

    def at(self, step: int) -> float:
        """Return the value at a step; the first step is 1."""
        raise NotImplementedError

    def begin_period(self) -> None:
        """Take note of a refresh, at which the optimizer calls this of an interval."""

    def decides_at(self, step: int) -> bool:
        """Return whether `decide` is to be called after this step of a period; its first step, the refresh, is 1."""
        return False

    def decide(self, displacement: float) -> None:
        """Take how far the gradient's direction has moved in this period, from 0 to 2 (`Displacement`)."""

    def observe(self, loss: float) -> None:
        """Take a validation loss (nats per token); most controls ignore it."""

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state as plain values: the dataclass's fields.

        Raises:
            ValueError: the control keeps something that is no field, or no plain value, and would be lost.
        """
        names, own = [f.name for f in fields(self)], type(self).__name__
        if lost := [name for name in vars(self) if name not in names]:
            how = "write @dataclass above the class, and a field for it (for state: field(init=False, default=…))"
            raise ValueError(f"{own} keeps {lost[0]!r}, which is no field of a dataclass and would not be saved: {how}")
        return {"kind": self.kind} | {name: _plain(f"{own}.{name}", as_plain(getattr(self, name))) for name in names}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Control:
        """Return a new control with the settings of a mapping."""
        known = [f.name for f in fields(cls) if f.init]
        given = {key: value for key, value in settings.items() if key != "kind"}
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"{cls.kind} has no {unknown[0]!r}; it has {', '.join(known)}")
        try:
            return cls(**given)
        except TypeError:
            raise ValueError(f"{cls.kind} needs {', '.join(known)}; given {given or 'nothing'}") from None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Control:
        """Return a control that continues from a `state_dict`."""
        own = {f.name for f in fields(cls) if not f.init}
        control = cls.from_settings({key: value for key, value in state.items() if key not in own})
        for name in own & state.keys():
            setattr(control, name, state[name])
        return control


@dataclass
class Constant(Control):
    """The same value at every step."""

    kind: ClassVar[str] = "constant"
    value: float

    def __post_init__(self) -> None:
        _number("value", self.value)

    def at(self, step: int) -> float:
        """Return `value` for every step."""
        return self.value


@dataclass
class LinearDecay(Control):
    """AdaFRUGAL's density: `ρ(k) = max(end, start − (start − end)·min(1, k/steps))`, k = 1 at the first step.

    Args:
        start: the density before the first step, in [0, 1].
        end: the density from step `steps` on, in [0, start].
        steps: K, the number of optimizer steps of the decay; AdaFRUGAL takes the length of the run.
    """

    kind: ClassVar[str] = "linear"
    start: float = 0.25
    end: float = 0.05
    steps: int = 200_000

    def __post_init__(self) -> None:
        _share("start", self.start)
        _share("end", self.end)
        _count("steps", self.steps)
        if self.end > self.start:
            raise ValueError(f"end is {self.end}, above start ({self.start}); a decay falls")

    def at(self, step: int) -> float:
        """Return the density at `step`, in [end, start]."""
        return max(self.end, self.start - (self.start - self.end) * min(1.0, step / self.steps))


@dataclass
class CosineDecay(LinearDecay):
    """A density on half a cosine: `ρ(k) = end + (start − end)·½(1 + cos(π·min(1, k/steps)))`. Ours, in no paper.

    It stays near `start` for longer than `LinearDecay` and is near `end` sooner; the arguments are the same.
    """

    kind: ClassVar[str] = "cosine"

    def at(self, step: int) -> float:
        """Return the density at `step`, in [end, start]."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2


@dataclass
class LossAware(Control):
    """AdaFRUGAL's interval: it grows by `factor` whenever the validation loss has settled.

    With L the observed loss and L' the one before: `r = |L − L'| / (|L'| + 1e-9)`; if `r < threshold` and
    `L < gate` then `T ← min(max, round(factor·T))`, rounding halves to even, but by 1 at least. (The paper writes L'
    for |L'|, and has no least growth, without which 2 never grows by 1.2.) The first observation only sets L'.
    A training loss is noisy: average it over the steps since the last observation, or set `smoothing`.

    Args:
        start: T before anything is observed, in steps.
        max: the largest T, in steps.
        factor: γ, by which T grows; above 1.
        threshold: τ, the relative change under which the loss counts as settled.
        gate: T grows only if the loss is below this (nats per token); the published 20 never binds.
        every: steps between two observations, for the training loop; `observe` counts every call.
        source: the loss that the loop passes, "validation" or "training" (its mean since the last observation).
        smoothing: β of a running mean `L ← β·L' + (1 − β)·observed`, compared instead of the loss; 0 for none, below 1.
    """

    kind: ClassVar[str] = "loss_aware"
    start: int = 100
    max: int = 1000
    factor: float = 1.5
    threshold: float = 0.005
    gate: float = 20.0
    every: int = 5000
    source: str = "validation"
    smoothing: float = 0.0
    value: int = field(init=False)
    last_loss: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        _count("start", self.start)
        _count("max", self.max)
        _count("every", self.every)
        if self.max < self.start:
            raise ValueError(f"max is {self.max}, below start ({self.start}); the interval only grows")
        for name, bound in (("factor", 1), ("threshold", 0), ("gate", 0)):
            if not _number(name, getattr(self, name)) > bound:
                raise ValueError(f"{name} is {getattr(self, name)}; a number above {bound} is needed")
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; allowed: {', '.join(SOURCES)}")
        if not 0 <= _number("smoothing", self.smoothing) < 1:
            raise ValueError(f"smoothing is {self.smoothing}; a share from 0 to below 1 is needed")
        self.value = self.start

    def at(self, step: int) -> int:
        """Return the current interval, in steps; it depends on observed losses, not on `step`."""
        return self.value

    def observe(self, loss: float) -> None:
        """Compare a loss with the previous one; warn about a loss that is not finite, and ignore it."""
        if not math.isfinite(loss):
            warnings.warn(f"the observed loss is {loss}: the interval stays {self.value}", stacklevel=2)
            return
        if self.last_loss is not None:
            loss = self.smoothing * self.last_loss + (1 - self.smoothing) * loss
            change = abs(loss - self.last_loss) / (abs(self.last_loss) + 1e-9)
            if change < self.threshold and loss < self.gate:
                self.value = min(self.max, max(self.value + 1, round(self.factor * self.value)))
        self.last_loss = float(loss)


@dataclass
class Displacement(Control):
    """T by what the gradient says: a period ends when the gradient's direction has moved too little for its length.

    Lotus (arXiv 2602.01233, Algorithm 1): R is the gradient in the subspace, R₁ that of the refresh, k the steps from
    the refresh on; `‖R/‖R‖ − R₁/‖R₁‖‖ / k < threshold` ends the period. It needs no validation set. Lotus decides for
    each matrix, and its k is one more; here a group ends its period as a whole, by the mean over its matrices, since
    the refresh of the group. Directions of noise are √2 apart, so that noise alone makes T about √2/threshold.

    The optimizer keeps each R₁ in bfloat16 (ours), which adds a quarter to AdamW's moments in float32.

    Args:
        threshold: γ; Lotus takes 0.005 to 0.02.
        check: η, the steps from one check to the next; Lotus takes 25 to 100.
        min: the step of the first check, and the least T.
        max: the largest T, in steps.
    """

    kind: ClassVar[str] = "displacement"
    keeps_gradients: ClassVar[bool] = True
    threshold: float = 0.01
    check: int = 50
    min: int = 50
    max: int = 1000
    value: int = field(init=False)  # T of this period, as far as it is known: it grows from check to check

    def __post_init__(self) -> None:
        for name in ("check", "min", "max"):
            _count(name, getattr(self, name))
        if not _number("threshold", self.threshold) > 0:
            raise ValueError(f"threshold is {self.threshold}; a number above 0 is needed")
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, below min ({self.min})")
        self.begin_period()

    def at(self, step: int) -> int:
        """Return the least T that this period can have, in steps; it depends on gradients, not on `step`."""
        return self.value

    def begin_period(self) -> None:
        """Begin a period, which lasts `min` steps at least."""
        self.value = self.min

    def decides_at(self, step: int) -> bool:
        """Return whether this is the last step that is known to be in the period, and it may last longer."""
        return step == self.value < self.max

    def decide(self, displacement: float) -> None:
        """Let the period last until the next check, unless the direction has moved too little."""
        if displacement / self.value >= self.threshold:
            self.value = min(self.max, self.value + self.check)


DENSITIES: dict[str, type[Control]] = {c.kind: c for c in (Constant, LinearDecay, CosineDecay)}
INTERVALS: dict[str, type[Control]] = {c.kind: c for c in (Constant, LossAware, Displacement)}


def restored(state: Mapping[str, Any], old: Control) -> Control:
    """Return the control of a `state_dict`: a built-in control, or one of `old`'s class."""
    kinds = DENSITIES | INTERVALS | {old.kind: type(old)}
    if state["kind"] not in kinds:
        raise ValueError(f"kind is {state['kind']!r}; allowed: {', '.join(kinds)}, or what the optimizer was made with")
    return kinds[state["kind"]].from_state(state)


def density(value: float | Mapping[str, Any] | Control) -> Control:
    """Return the density control that `value` describes; a copy, so that no two groups share its state.

    Raises:
        ValueError: an unknown kind or key, or a value outside [0, 1].
    """
    return _control(value, DENSITIES, _share)


def interval(value: int | Mapping[str, Any] | Control) -> Control:
    """Return the interval control that `value` describes; a copy, as in `density`.

    Raises:
        ValueError: an unknown kind or key, or a value that is not a whole number of steps from 1 up.
    """
    return _control(value, INTERVALS, _count)


def _control(value: Any, kinds: Mapping[str, type[Control]], check: Callable[[str, Any], None]) -> Control:
    """Return a control of one of `kinds`, or one of the caller's own; `check` a constant."""
    if isinstance(value, Control):
        if value.kind in DENSITIES | INTERVALS and value.kind not in kinds:
            raise ValueError(f"kind is {value.kind!r}; allowed here: {', '.join(kinds)}, or a control of your own")
        value.state_dict()  # refuses what could not be saved
        control = copy.deepcopy(value)
    elif isinstance(value, Mapping):
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(kinds)}")
        control = kinds[kind].from_settings(value)
    else:
        control = Constant(value)
    if isinstance(control, Constant):
        check("value", control.value)
    return control


def _plain(name: str, value: Any) -> Any:
    """Return a copy of a value that every process can read from a saved state."""
    if isinstance(value, dict):
        return {key: _plain(f"{name}[{key!r}]", part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(name, part) for part in value)
    for kind in (bool, int, float, str):  # numpy's float64 is a float
        if isinstance(value, kind):
            return kind(value)
    if value is not None:
        allowed = "numbers, strings, None, and lists, tuples or dicts of them"
        raise ValueError(f"{name} is a {type(value).__name__}, which cannot be saved; allowed: {allowed}")
    return None


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; a number is needed")
    return value


def _share(name: str, value: Any) -> None:
    if not 0 <= _number(name, value) <= 1:
        raise ValueError(f"{name} is {value}; a density is a share of the entries, from 0 to 1")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; a whole number of steps, at least 1, is needed")
