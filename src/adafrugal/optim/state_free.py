"""State-free rules: the update of entries that keep no state, by the present gradient alone; and the table of names.

A rule is an object with settings only. `kernels` has fast forms of `signsgd`, `sgd` and `none`, by name; the formulas
of the others are in `normalizing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from adafrugal.optim import choices, normalizing
from adafrugal.optim.rules import Rates, sign

Sees: TypeAlias = Literal["nothing", "entries", "rows", "columns", "matrix"]


@dataclass(frozen=True)
class StateFree(ABC):
    """A rule that updates a matrix W by a direction D of its gradient G: `W ← W − lr·D(G)`.

    `sees` says how much of a matrix [n_out, n_in] the rule must be given at once, that is, on how much of the gradient
    an entry of D depends: its own `entries`; their whole `rows`, or whole `columns`; or the whole `matrix`. If a part
    of a matrix keeps state, a rule that sees entries is given the gradient of the rest (its residual, with svd and
    random). A rule that sees more is given the whole gradient, and the part of D within the subspace is dropped: lines
    or entries that keep state, or D's projection. So D does not change with the selection.

    Scale D to a root mean square of about 1, as that of signs is, and lr keeps its meaning.
    """

    kind: ClassVar[str]
    sees: ClassVar[Sees] = "matrix"
    takes_stacks: ClassVar[bool] = False  # whether `direction` takes [k, n_out, n_in] and treats each matrix alone
    sums_rows: ClassVar[bool] = False  # whether it has `of_rows`, so that no process needs a whole matrix

    def __post_init__(self) -> None:
        if self.sees not in choices.SEES:
            raise ValueError(f"sees is {self.sees!r}; allowed: {', '.join(choices.SEES)}")
        choices.refuse_settings("state_free", self.kind, vars(self))

    @property
    def by_entry(self) -> bool:
        """Whether any part of a tensor of any shape can be given alone."""
        return choices.goes_by_entry(self.sees)

    @abstractmethod
    def direction(self, grad: Tensor) -> Tensor:
        """Return D of a gradient, of its shape and dtype, without changing the gradient.

        Args:
            grad: all that the rule `sees`: [n_out, n_in]; some of the rows [n, n_in], if it sees rows, or some of the
                columns [n_out, n], if it sees columns; any shape, if it sees entries. If it `takes_stacks`, also
                several of one shape, [k, n_out, n_in]: on a GPU many small matrices then take few launches.
        """

    def of_rows(self, grads: Sequence[Tensor], lengths: Sequence[int], total: normalizing.Total) -> list[Tensor]:
        """Return the rows of D for some rows of several matrices, by sums over all rows (`sums_rows`).

        Args:
            grads: [n, n_in] of each, of which other processes have the other rows; n may be 0.
            lengths: n_out of each.
            total: returns the sums of tensors over all processes, which must call it equally often.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no of_rows, which sums_rows needs")

    def __call__(self, grad: Tensor) -> Tensor:
        """Return `direction(grad)`.

        Raises:
            ValueError: it has another shape than the gradient.
        """
        if not grad.numel():  # a process without a row of a sharded matrix
            return grad
        found = self.direction(grad)
        if found.shape != grad.shape:
            what = f"the direction of state-free rule {self.kind} has shape {list(found.shape)}"
            raise ValueError(f"{what} for a gradient of shape {list(grad.shape)}; the two must be equal")
        return found

    def update_(self, param: Tensor, grad: Tensor, rates: Rates, scale: Tensor | None = None) -> None:
        """Apply `W ← W − lr·scale·D(g)`; `scale` broadcasts to W."""
        direction = self(grad)
        if scale is not None:
            is_own = direction is not grad and not direction._is_view()  # and may be changed
            direction = torch.mul(direction, scale, out=direction if is_own else None)
        param.add_(direction, alpha=-rates.lr)

    def settings(self) -> dict[str, Any]:
        """Return kind and settings as plain values, as `state_free` reads them."""
        return {"kind": self.kind} | asdict(self)

    def saved(self) -> str | dict[str, Any]:
        """Return the kind alone if there are no settings, as older saved states have it."""
        settings = self.settings()
        return settings if len(settings) > 1 else self.kind


@dataclass(frozen=True)
class SignSGD(StateFree):
    """signSGD (Bernstein et al., arXiv 1802.04434): `D = sign(G)`."""

    kind: ClassVar[str] = "signsgd"
    sees: ClassVar[Sees] = "entries"

    def direction(self, grad: Tensor) -> Tensor:
        """Return the signs, 0 for 0 and NaN for NaN."""
        return sign(grad)


@dataclass(frozen=True)
class SGD(StateFree):
    """Gradient descent: `D = G`."""

    kind: ClassVar[str] = "sgd"
    sees: ClassVar[Sees] = "entries"

    def direction(self, grad: Tensor) -> Tensor:
        """Return the gradient."""
        return grad


@dataclass(frozen=True)
class NoUpdate(StateFree):
    """No update; decay still applies."""

    kind: ClassVar[str] = "none"
    sees: ClassVar[Sees] = "nothing"

    def direction(self, grad: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(grad)

    def update_(self, param: Tensor, grad: Tensor, rates: Rates, scale: Tensor | None = None) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class RowNorm(StateFree):
    """Rows of G at a root mean square of 1: SCALE's columns (arXiv 2506.16659), whose matrices are [n_in, n_out]."""

    kind: ClassVar[str] = "rownorm"
    sees: ClassVar[Sees] = "rows"
    takes_stacks: ClassVar[bool] = True

    def direction(self, grad: Tensor) -> Tensor:
        """Return the normalized rows; a row of zeros stays so."""
        return normalizing.lines(grad, -1)


@dataclass(frozen=True)
class ColNorm(StateFree):
    """Each column of G at a root mean square of 1."""

    kind: ClassVar[str] = "colnorm"
    sees: ClassVar[Sees] = "columns"
    takes_stacks: ClassVar[bool] = True
    sums_rows: ClassVar[bool] = True

    def direction(self, grad: Tensor) -> Tensor:
        """Return the normalized columns; a column of zeros stays so."""
        return normalizing.lines(grad, -2)

    def of_rows(self, grads: Sequence[Tensor], lengths: Sequence[int], total: normalizing.Total) -> list[Tensor]:
        """Return rows of the normalized columns, by one sum."""
        return normalizing.columns_of_rows(grads, lengths, total)


@dataclass(frozen=True)
class Sinkhorn(StateFree):
    """Rows and columns of G normalized in turn, `rounds` times, as in SinkGD (Scetbon et al., arXiv 2502.06742)."""

    kind: ClassVar[str] = "sinkhorn"
    takes_stacks: ClassVar[bool] = True
    sums_rows: ClassVar[bool] = True
    rounds: int = 5

    def direction(self, grad: Tensor) -> Tensor:
        """Return a matrix whose columns, and nearly its rows, have a root mean square of 1."""
        return normalizing.sinkhorn(grad, self.rounds)

    def of_rows(self, grads: Sequence[Tensor], lengths: Sequence[int], total: normalizing.Total) -> list[Tensor]:
        """Return rows of these matrices, by a sum in each round."""
        return normalizing.sinkhorn_of_rows(grads, self.rounds, lengths, total)


@dataclass(frozen=True)
class Whiten(StateFree):
    """G with singular values near 1: Newton–Schulz iterations as in Muon, on the gradient, without momentum."""

    kind: ClassVar[str] = "whiten"
    takes_stacks: ClassVar[bool] = True
    steps: int = 5

    def direction(self, grad: Tensor) -> Tensor:
        """Return UVᵀ of G's singular value decomposition, approximately, at a root mean square of about 1."""
        return normalizing.whitened(grad, self.steps)


@dataclass(frozen=True)
class Swan(StateFree):
    """Rows of G standardized, then whitened, as in SWAN (Ma et al., arXiv 2412.13148)."""

    kind: ClassVar[str] = "swan"
    takes_stacks: ClassVar[bool] = True
    steps: int = 5

    def direction(self, grad: Tensor) -> Tensor:
        """Return the whitened standardized rows, at a root mean square of about 1."""
        return normalizing.whitened(normalizing.standardized_rows(grad), self.steps)


STATE_FREE: dict[str, type[StateFree]] = {
    rule.kind: rule for rule in (SignSGD, SGD, NoUpdate, Whiten, Swan, Sinkhorn, RowNorm, ColNorm)
}


def state_free(value: str | Mapping[str, Any] | StateFree) -> StateFree:
    """Return the rule that `value` describes: a name with its defaults, a mapping `{"kind": …, …}`, or an object.

    Raises:
        ValueError: an unknown kind or setting, or a class with the kind of another.
    """
    if not isinstance(value, StateFree):
        return choices.made("state_free", value, STATE_FREE)
    if STATE_FREE.get(value.kind, type(value)) is not type(value):
        what = f"{type(value).__name__} has the kind {value.kind!r} of {STATE_FREE[value.kind].__name__}"
        raise ValueError(f"{what}, whose fast forms would be used: give it a kind of its own")
    return value
