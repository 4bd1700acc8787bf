"""Subspaces of directions: each matrix's gradient is projected onto a low-rank basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adafrugal.optim.rules import Free
from adafrugal.optim.subspaces.base import Regions, Selection, Subspace


@dataclass(frozen=True)
class _Projection(Subspace):
    """A basis P [d, r] with orthonormal columns, on one side of each matrix [n_out, n_in].

    On the left, d = n_out, compact tensors are `R = PᵀG` [r, n_in], an update U of them moves the matrix by `PU`, and
    the state-free rule takes the residual `G − PR`. On the right, d = n_in, `R = GP` [n_out, r], `UPᵀ` and `G − RPᵀ`.
    The rank r is `round(ρ·d)`, at most the smaller side. By default d is the smaller side, the right one if both are
    equal.

    The selection is `basis` [d, r], float32. The side follows from the shape of the matrix, so it is in no state; the
    shape of a compact tensor would not tell it.
    """

    remembers: ClassVar[tuple[str, ...]] = ("basis",)
    chosen_by_one: ClassVar[bool] = True
    in_batches: ClassVar[bool] = True
    side: str = "smaller"

    def axis(self, shape: torch.Size) -> int:
        """Return the axis of compact tensors that counts directions: 0 on the left, 1 on the right."""
        if self.side == "smaller":
            return 1 if shape[1] <= shape[0] else 0
        return 1 if self.side == "right" else 0

    def rank(self, shape: torch.Size, share: float) -> int:
        """Return the number of directions."""
        rank: int = min(round(share * shape[self.axis(shape)]), *shape)
        return rank

    def entries(self, shape: torch.Size, share: float) -> int:
        """Return the rank times the length of the other side."""
        return self.rank(shape, share) * shape[1 - self.axis(shape)]

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Return a new basis."""
        axis = self.axis(param.shape)
        rank = self.rank(param.shape, share)
        basis = self._basis(param, grad, axis, rank, generator, old.get("basis"))
        basis = basis.clone(memory_format=torch.contiguous_format)  # a view would keep all of U in memory
        return {"basis": basis}

    def blank(self, param: Tensor, share: float) -> Selection:
        """Return an uninitialised basis of the size for this share."""
        size = param.shape[self.axis(param.shape)], self.rank(param.shape, share)
        return {"basis": torch.empty(size, dtype=torch.float32, device=param.device)}

    def _basis(
        self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator, old: Tensor | None
    ) -> Tensor:
        """Return orthonormal columns [d, rank], float32, on the matrix's device; `old` is the basis before."""
        raise NotImplementedError

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return the leading directions."""
        return {"basis": old["basis"][:, : self.rank(shape, share)].clone()}

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Number the directions in their order."""
        return torch.arange(selection["basis"].shape[1], device=selection["basis"].device)

    def project(self, grad: Tensor, selection: Selection) -> Tensor:
        """Return a gradient's compact part; of a batch of matrices, [b, …], with a batch of bases."""
        basis: Tensor = selection["basis"].to(grad.dtype)
        return grad @ basis if self.axis(grad.shape[-2:]) else basis.mT @ grad

    def rest(self, grad: Tensor, compact: Tensor, selection: Selection, out: Tensor | None = None) -> Tensor:
        """Return a gradient without its compact part, in `out` if given; of a batch of matrices, too."""
        subtract = torch.addmm if grad.ndim == 2 else torch.baddbmm
        return subtract(grad, *self._factors(compact, selection, grad.shape[-2:]), alpha=-1, out=out)

    def back(self, compact: Tensor, selection: Selection, shape: torch.Size) -> Tensor:
        """Project compact tensors back to a matrix of this shape; of a batch of matrices, too."""
        return torch.matmul(*self._factors(compact, selection, shape))

    def _factors(self, compact: Tensor, selection: Selection, shape: torch.Size) -> tuple[Tensor, Tensor]:
        basis = selection["basis"].to(compact.dtype)
        return (compact, basis.mT) if self.axis(shape) else (basis, compact)

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return zeros of the compact shape to hold the state-full update, and the residual for the state-free rule."""
        compact = self.project(grad, selection)
        rest = self.rest(grad, compact, selection) if residual else grad
        return Regions(full=(torch.zeros_like(compact), compact), free=(Free(param, rest),))

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Project the update back and add it to the matrix."""
        param.addmm_(*self._factors(target, selection, param.shape))


@dataclass(frozen=True)
class SVD(_Projection):
    """The leading singular vectors of the gradient at the refresh (GaLore, arXiv 2403.03507; FRUGAL).

    Args:
        side: of the matrix to project.
        svd_method: "exact" is torch.linalg.svd. "subspace_iteration" is faster and approximate: rounds of
            `Q ← qr(G(GᵀQ))` (Halko et al., arXiv 0909.4061), which begin with the basis before, or at random. Both are
            in float32, for any dtype of the gradient.
        rounds: of the iteration; two more if it begins at random.
    """

    kind: ClassVar[str] = "svd"
    needs_gradient: ClassVar[bool] = True
    svd_method: str = "exact"
    rounds: int = 1

    @property
    def starts_from(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the name of the old basis, if the new one begins with it."""
        return ("basis",) if self.svd_method == "subspace_iteration" else ()

    def _basis(
        self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator, old: Tensor | None
    ) -> Tensor:
        assert grad is not None, "a subspace that needs gradients is asked where there is one"
        if self.svd_method == "exact":
            left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
            vectors: Tensor = right.T if axis else left
            return vectors[:, :rank]
        grad = grad.float().T if axis else grad.float()
        known = 0 if old is None else min(old.shape[1], rank)
        basis = _gaussian(grad.shape[0], rank, generator).to(grad.device)
        if old is not None:
            basis[:, :known] = old[:, :known]
        for _ in range(self.rounds + (0 if known else 2)):
            basis = torch.linalg.qr(grad @ (grad.T @ basis)).Q
        energy = (grad.T @ basis).square().sum(0)
        return basis[:, energy.argsort(descending=True)]  # the leading ones stay if ρ falls


@dataclass(frozen=True)
class Random(_Projection):
    """A random basis with orthonormal columns, drawn at each refresh (FRUGAL, arXiv 2411.07837).

    Args:
        side: of the matrix to project.
    """

    kind: ClassVar[str] = "random"

    def _basis(
        self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator, old: Tensor | None
    ) -> Tensor:
        basis: Tensor = torch.linalg.qr(_gaussian(param.shape[axis], rank, generator).to(param.device)).Q
        return basis


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
