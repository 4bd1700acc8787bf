"""APOLLO, against a second implementation in numpy and the authors' package."""

import math

import numpy as np
import pytest
import torch
from stepping import matrices, stepped

from adafrugal.optim.baselines.apollo import Apollo

SHAPES = [(6, 10), (10, 6), (5, 5)]
GIVEN = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2}


class Recorded(Apollo):
    """Keeps the bases that it draws, or takes `bases` of the group: by place, then by period."""

    def _basis(self, grad, state, group, done, period):
        if "bases" in group:
            return group["bases"][period.first][period.number - 1]
        basis = super()._basis(grad, state, group, done, period)
        self.drawn = {**getattr(self, "drawn", {}), (period.first, done): basis}
        return basis


def reference(weight, grads, bases, scaling, *, lr, betas, eps, weight_decay, growth):
    """W after these gradients, float64."""
    m = v = last = None
    n_out, n_in = weight.shape
    for t, (grad, basis) in enumerate(zip(grads, bases, strict=True), 1):
        compact = (grad @ basis if n_in <= n_out else basis.T @ grad.copy())
        m = (1 - betas[0]) * compact + (0 if m is None else betas[0] * m)
        v = (1 - betas[1]) * compact**2 + (0 if v is None else betas[1] * v)
        update = m / (np.sqrt(v) + eps)
        scaled = grad.copy()
        if scaling == "tensor":
            scaled *= np.sqrt((update**2).sum()) / (np.sqrt((compact**2).sum()) + eps)
        elif n_in <= n_out:
            for i in range(n_out):
                scaled[i] *= np.sqrt((update[i] ** 2).sum()) / (np.sqrt((compact[i] ** 2).sum()) + eps)
        else:
            for j in range(n_in):
                scaled[:, j] *= np.sqrt((update[:, j] ** 2).sum()) / (np.sqrt((compact[:, j] ** 2).sum()) + eps)
        norm = np.sqrt((scaled**2).sum())
        if last is not None and norm > growth * last:
            scaled *= growth * last / norm
        last = np.sqrt((scaled**2).sum())
        weight = weight * (1 - lr * weight_decay)
        weight = weight - lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * scaled
    return weight


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("growth", [1.01, 1e9])
def test_steps_are_those_of_the_formula(scaling, growth):
    """Two steps with one basis, then two with the next."""
    params = matrices(SHAPES, torch.float64)
    starts, grads = [p.detach().numpy().copy() for p in params], [[] for _ in params]
    optimizer = Recorded(params, rank=2, interval=2, scaling=scaling, growth=growth, **GIVEN)
    for step in range(4):
        stepped(optimizer, [step])
        for kept, param in zip(grads, params, strict=True):
            kept.append(param.grad.numpy().copy())
    for place, (start, given, param) in enumerate(zip(starts, grads, params, strict=True)):
        bases = [optimizer.drawn[place, done].double().numpy() for done in range(4)]
        assert np.array_equal(bases[0], bases[1])
        assert not np.array_equal(bases[1], bases[2])
        expected = reference(start, given, bases, scaling, growth=growth, **GIVEN)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{"rank": 64}, {"rank": 1, "scaling": "tensor"}], ids=["apollo", "mini"])
@pytest.mark.parametrize("shape", [(256, 688), (688, 256)])
def test_the_first_step_is_about_as_large_as_adams(shape, options):
    """A root mean square of lr, for any rank; so a rate for AdamW is one for APOLLO."""
    (param,) = params = matrices([shape])
    before = param.detach().clone()
    stepped(Apollo(params, lr=1.0, **options), [0])
    assert (param - before).square().mean().sqrt().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_steps_are_those_of_the_authors_package(scaling):
    """Given its bases; without decay, which comes in another order there."""
    theirs = pytest.importorskip("apollo_torch", exc_type=ImportError)
    projector = pytest.importorskip("apollo_torch.random_projector")
    ours, other, bases = matrices(SHAPES), matrices(SHAPES), []
    for place, (n_out, n_in) in enumerate(SHAPES):
        seed, drawn = place + 1, []
        for _ in range(3):
            size = (2, n_in) if n_out >= n_in else (n_out, 2)
            basis = projector.stable_randn(size, seed=seed) / math.sqrt(2)
            drawn.append(basis.T if n_out >= n_in else basis)
            seed = projector.next_seed(seed)
        bases.append(drawn)
    stepped(Recorded([{"params": ours, "bases": bases}], lr=0.01, rank=2, interval=3, scaling=scaling), range(8))
    group = {"params": other, "rank": 2, "proj": "random", "proj_type": "std", "update_proj_gap": 3, "scale": 1.0}
    stepped(theirs.APOLLOAdamW([{**group, "scale_type": scaling}], lr=0.01, eps=1e-8), range(8))
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
