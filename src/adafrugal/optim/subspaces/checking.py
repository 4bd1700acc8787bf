"""Try a subspace of one's own, apart from an optimizer: what is missing or wrong is said in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from adafrugal.optim.subspaces.base import Matrix, Period, Regions, Selection, Subspace

_SHARES = (1.0, 0.5, 0.2)


def check_subspace(subspace: Subspace, shape: Sequence[int] = (12, 20)) -> None:
    """Select in a matrix as the optimizer does, and update it; raise if `subspace` does not keep the interface.

    It tries several shares, the same draw again, a smaller share, a second period, and the update of both rules. The
    sum of what the two rules move must be the whole gradient, once.

    Args:
        subspace: an object of a class derived from `Subspace`.
        shape: [n_out, n_in] of the matrix; take one that your model has.

    Raises:
        ValueError: what is missing or wrong, with the name of the method.
    """
    size, name = torch.Size(shape), type(subspace).__name__
    _check_settings(subspace, name)
    matrices = [Matrix(f"layers.{i}", size, layer=i) for i in range(10)]
    before = [0.0] * len(matrices), 0
    for share in reversed(_SHARES):
        shares = _call(subspace, "shares", matrices, share, Period(seed=0, number=1))
        grow = len(shares) == len(matrices) and all(a <= b <= 1 for a, b in zip(before[0], shares, strict=True))
        if not grow:
            _refuse(name, f"shares is {shares} at density {share}", "a share a matrix, up to 1, that grows with ρ")
        entries, most = _call(subspace, "entries", size, max(shares)), size.numel()
        if not isinstance(entries, int) or not before[1] <= entries <= most:
            _refuse(name, f"entries is {entries!r} at share {share}", f"a number up to {most}, that grows with it")
        before = shares, entries
    if not before[1]:
        _refuse(name, f"entries is 0 for a whole matrix {list(size)}", "a shape of which something can be selected")
    for share in _SHARES:
        if _call(subspace, "entries", size, share):
            _Trial(subspace, size, share).make()


def _refuse(name: str, what: str, needed: str) -> NoReturn:
    raise ValueError(f"{name}: {what}; needed: {needed}")


def _check_settings(subspace: Subspace, name: str) -> None:
    if not isinstance(subspace, Subspace):
        _refuse(name, "it is no Subspace", "an object of a class derived from adafrugal.optim.Subspace")
    if not isinstance(getattr(subspace, "kind", None), str):
        _refuse(name, "it has no kind", "a name in the class: kind: ClassVar[str] = 'my_name'")
    settings = {f.name: getattr(subspace, f.name) for f in fields(subspace)}
    if type(subspace)(**settings) != subspace or any(isinstance(value, Tensor) for value in settings.values()):
        needed = "fields of a frozen dataclass, with plain values (a state is in selections)"
        _refuse(name, f"its settings are {settings}", needed)


def _call(subspace: Subspace, method: str, *given: Any) -> Any:
    """Call a method; name it in every error."""
    function: Callable[..., Any] = getattr(subspace, method)
    try:
        return function(*given)
    except Exception as error:  # of any class, from other people's code
        text = str(error) or "without a word"
        raise ValueError(f"{type(subspace).__name__}.{method} raises {type(error).__name__}: {text}") from error


class _Trial:
    """One matrix and its selection at one share."""

    def __init__(self, subspace: Subspace, shape: torch.Size, share: float) -> None:
        self.subspace, self.shape, self.share, self.name = subspace, shape, share, type(subspace).__name__
        generator = torch.Generator().manual_seed(0)
        self.param, self.grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.entries = subspace.entries(shape, share)

    def make(self) -> None:
        """Select, update, shrink, and select in the next period."""
        chosen = self._selected(1, {})
        if not _equal(chosen, self._selected(1, {})):
            self._refuse("select gives another selection the second time", "draws from `generator` alone")
        self._check_update(chosen)
        if not chosen:
            return
        self._check_positions(chosen)
        self._check_shrunk(chosen)
        needed = {name: value for name, value in chosen.items() if not isinstance(value, Tensor)}
        needed |= {name: chosen[name] for name in self.subspace.starts_from}
        self._check_update(self._selected(2, needed))

    def _selected(self, number: int, old: Selection) -> Selection:
        subspace, state = self.subspace, torch.random.get_rng_state()
        param, grad = self.param.clone(), self.grad.clone()
        chosen: Selection = _call(subspace, "select", param, grad, self.share, self._generator(number), old, 0)
        if not torch.equal(state, torch.random.get_rng_state()):
            self._refuse("select draws from torch's global generator", "draws from `generator` alone")
        if not (torch.equal(param, self.param) and torch.equal(grad, self.grad)):
            self._refuse("select changes the matrix or its gradient", "that it only reads them")
        if set(chosen) != set(subspace.remembers):
            what = f"select returns {sorted(chosen)} and remembers is {subspace.remembers}"
            self._refuse(what, "the same names in both")
        for key, value in chosen.items():
            if not isinstance(value, int | float if key in subspace.numbers else Tensor):
                what = f"{key} in the selection is a {type(value).__name__} and numbers is {subspace.numbers}"
                self._refuse(what, "a tensor, or a number that numbers names")
        return chosen

    def _generator(self, number: int) -> torch.Generator:
        return Period(seed=0, number=number).generator(0)

    def _check_update(self, chosen: Selection) -> None:
        """Update by gradient descent with both rules."""
        param, full = self.param.clone(), (self.param, self.grad)
        regions: Regions = _call(self.subspace, "regions", param, self.grad.clone(), chosen)
        full = regions.full
        if full[0].shape != full[1].shape or full[0].numel() != self.entries:
            shapes = f"a target of shape {list(full[0].shape)} and a gradient of {list(full[1].shape)}"
            needed = f"{self.entries} entries in each, as entries says"
            self._refuse(f"regions gives the state-full rule {shapes}", needed)
        if chosen and (size := _call(self.subspace, "compact", self.shape, chosen)) != full[0].shape:
            self._refuse(f"compact is {list(size)}, but regions gives {list(full[0].shape)}", "the same shape")
        is_view = full[0].untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
        if self.subspace.in_place and not is_view:
            self._refuse("in_place is True, but regions gives the state-full rule a copy", "a view of the matrix")
        full[0].sub_(full[1])
        for target, grad, scale in regions.free:
            target.sub_(grad if scale is None else grad * scale)
        _call(self.subspace, "close", param, full[0], chosen)
        apart = (param - (self.param - self.grad)).abs()
        if apart.max() > 1e-4 * self.grad.abs().max():
            where = f"entry {list(divmod(int(apart.argmax()), self.shape[1]))} of a matrix {list(self.shape)}"
            what = f"by regions and close {where} does not move by its gradient"
            self._refuse(what, "that each entry is updated once, by one of the rules, or by both in parts")

    def _check_positions(self, chosen: Selection) -> None:
        """Check what `compact`, `narrow`, and moments that are kept rely on."""
        compact = self.subspace.compact(self.shape, chosen)
        positions = _call(self.subspace, "positions", self.shape, chosen)
        axis = _call(self.subspace, "axis", self.shape)
        if len(positions) != compact[axis] or not bool((positions.diff() > 0).all()):
            self._refuse(f"positions is {positions.tolist()[:8]}", f"{compact[axis]} numbers, ascending, one a unit")

    def _check_shrunk(self, old: Selection) -> None:
        """Give up a part as a falling density does."""
        share = self.share * 0.6
        entries = self.subspace.entries(self.shape, share)
        if not 0 < entries < self.entries:
            return
        new = _call(self.subspace, "shrink", self.shape, share, self._generator(1), old)
        moment = torch.zeros(self.subspace.compact(self.shape, old))
        cut = _call(self.subspace, "narrow", moment, self.shape, old, new)
        needed = self.subspace.compact(self.shape, new)
        if cut.shape != needed or cut.numel() != entries:
            what = f"after shrink, narrow gives moments {list(cut.shape)}"
            self._refuse(what, f"{list(needed)}, of {entries} entries in all")
        before, now = (self.subspace.positions(self.shape, chosen) for chosen in (old, new))
        if not torch.isin(now, before).all():
            self._refuse("shrink selects what was not selected", "a part of the old selection")

    def _refuse(self, what: str, needed: str) -> NoReturn:
        _refuse(self.name, f"{what} (share {self.share})", needed)


def _equal(one: Selection, other: Selection) -> bool:
    return all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())
