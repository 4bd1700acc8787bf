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

    The selection is `basis` [d, r], float32, and `side`, which the shape of a square matrix would not tell.
    """

    remembers: ClassVar[tuple[str, ...]] = ("basis", "side")
    chosen_by_one: ClassVar[bool] = True
    side: str = "smaller"

    def axis(self, shape: torch.Size) -> int:
        """Return the axis of compact tensors that counts directions: 0 on the left, 1 on the right."""
        if self.side == "smaller":
            return 1 if shape[1] <= shape[0] else 0
        return 1 if self.side == "right" else 0

    def rank(self, shape: torch.Size, share: float) -> int:
        """Return the number of directions."""
        return min(round(share * shape[self.axis(shape)]), *shape)

    def entries(self, shape: torch.Size, share: float) -> int:
        """Return the rank times the length of the other side."""
        return self.rank(shape, share) * shape[1 - self.axis(shape)]

    def select(
        self, param: Tensor, grad: Tensor | None, share: float, generator: torch.Generator, old: Selection, place: int
    ) -> Selection:
        """Return a new basis."""
        axis = self.axis(param.shape)
        basis = self._basis(param, grad, axis, self.rank(param.shape, share), generator)
        basis = basis.clone(memory_format=torch.contiguous_format)  # a view would keep all of U in memory
        return {"basis": basis, "side": "right" if axis else "left"}

    def blank(self, param: Tensor, share: float) -> Selection:
        """Return an uninitialised basis of the size for this share."""
        axis = self.axis(param.shape)
        basis = torch.empty(param.shape[axis], self.rank(param.shape, share), device=param.device)
        return {"basis": basis, "side": "right" if axis else "left"}

    def _basis(self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator) -> Tensor:
        """Return orthonormal columns [d, rank], float32, on the matrix's device."""
        raise NotImplementedError

    def shrink(self, shape: torch.Size, share: float, generator: torch.Generator, old: Selection) -> Selection:
        """Return the leading directions."""
        return {"basis": old["basis"][:, : self.rank(shape, share)].clone(), "side": old["side"]}

    def positions(self, shape: torch.Size, selection: Selection) -> Tensor:
        """Number the directions in their order."""
        return torch.arange(selection["basis"].shape[1], device=selection["basis"].device)

    def regions(self, param: Tensor, grad: Tensor, selection: Selection, residual: bool = True) -> Regions:
        """Return zeros of the compact shape to hold the state-full update, and the residual for the state-free rule."""
        basis = selection["basis"].to(grad.dtype)
        if selection["side"] == "left":
            compact = basis.T @ grad
            rest = torch.addmm(grad, basis, compact, alpha=-1) if residual else grad
        else:
            compact = grad @ basis
            rest = torch.addmm(grad, compact, basis.T, alpha=-1) if residual else grad
        return Regions(full=(torch.zeros_like(compact), compact), free=(Free(param, rest),))

    def close(self, param: Tensor, target: Tensor, selection: Selection) -> None:
        """Project the update back and add it to the matrix."""
        basis = selection["basis"].to(target.dtype)
        if selection["side"] == "left":
            param.addmm_(basis, target)
        else:
            param.addmm_(target, basis.T)


@dataclass(frozen=True)
class SVD(_Projection):
    """The leading singular vectors of the gradient at the refresh (GaLore, arXiv 2403.03507; FRUGAL).

    Args:
        side: of the matrix to project.
        svd_method: `exact` is torch.linalg.svd, `randomized` torch.svd_lowrank (Halko et al., arXiv 0909.4061), faster
            and approximate; both in float32, for any dtype of the gradient.
    """

    kind: ClassVar[str] = "svd"
    needs_gradient: ClassVar[bool] = True
    svd_method: str = "exact"

    def _basis(self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator) -> Tensor:
        assert grad is not None, "a subspace that needs gradients is asked where there is one"
        if self.svd_method == "randomized":
            left, right = self._randomized(grad.float(), rank, generator)
        else:
            left, _, right_transposed = torch.linalg.svd(grad.float(), full_matrices=False)
            right = right_transposed.T
        return (right if axis else left)[:, :rank]

    def _randomized(self, grad: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, (), generator=generator))
        own = torch.cuda.default_generators[grad.device.index] if grad.is_cuda else torch.default_generator
        with torch.random.fork_rng([grad.device] if grad.is_cuda else []):  # svd_lowrank draws from the global one
            own.manual_seed(seed)
            left, _, right = torch.svd_lowrank(grad, q=min(rank + 8, *grad.shape), niter=2)
        return left, right


@dataclass(frozen=True)
class Random(_Projection):
    """A random basis with orthonormal columns, drawn at each refresh (FRUGAL, arXiv 2411.07837).

    Args:
        side: of the matrix to project.
    """

    kind: ClassVar[str] = "random"

    def _basis(self, param: Tensor, grad: Tensor | None, axis: int, rank: int, generator: torch.Generator) -> Tensor:
        gaussian = torch.randn(param.shape[axis], rank, generator=generator)
        return torch.linalg.qr(gaussian.to(param.device)).Q
