"""Fira, against a second implementation in numpy and the authors' package."""

import numpy as np
import pytest
import torch
from stepping import matrices, stepped

from adafrugal.optim.baselines.fira import Fira

SHAPES = [(6, 10), (10, 6), (5, 5)]
GIVEN = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2}


def reference(weight, grads, bases, alpha, *, lr, betas, eps, weight_decay, growth):
    """W after these gradients, float64; matrices with n_out < n_in are those of the transposed problem."""
    if weight.shape[0] < weight.shape[1]:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "growth": growth}
        return reference(weight.T, [grad.T for grad in grads], bases, alpha, **options).T
    m = v = 0
    last = None
    for t, (grad, basis) in enumerate(zip(grads, bases, strict=True), 1):
        compact = grad @ basis
        m = betas[0] * m + (1 - betas[0]) * compact
        v = betas[1] * v + (1 - betas[1]) * compact**2
        update = m / (np.sqrt(v) + eps)
        factor = np.sqrt((update**2).sum(1)) / (np.sqrt((compact**2).sum(1)) + eps)
        rest = (grad - alpha * compact @ basis.T) * factor[:, None]
        norm = np.sqrt((rest**2).sum())
        if last is not None and norm > growth * last:
            rest = rest * growth * last / norm
        last = np.sqrt((rest**2).sum())
        weight = weight * (1 - lr * weight_decay)
        size = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        weight = weight - size * (alpha * update @ basis.T + rest)
    return weight


@pytest.mark.parametrize(("growth", "alpha"), [(1.01, 1.0), (1e9, 1.0), (1.01, 0.25)])
def test_steps_are_those_of_the_formula(growth, alpha):
    """Two steps with one basis, then two with the next: the leading singular vectors at the refresh, to float32."""
    params = matrices(SHAPES, torch.float64)
    starts, grads, bases = [p.detach().numpy().copy() for p in params], [[] for _ in params], [[] for _ in params]
    optimizer = Fira(params, rank=2, interval=2, growth=growth, alpha=alpha, **GIVEN)
    for step in range(4):
        stepped(optimizer, [step])
        for given, used, param in zip(grads, bases, params, strict=True):
            given.append(param.grad.numpy().copy())
            used.append(optimizer.state[param]["basis"].numpy().copy())
    for start, given, used, param in zip(starts, grads, bases, params, strict=True):
        expected = reference(start, given, used, alpha, growth=growth, **GIVEN)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-12, atol=1e-13)
        assert np.array_equal(used[0], used[1])
        for at in (0, 2):
            left, _, right = np.linalg.svd(given[at])
            leading = left[:, :2] if start.shape[0] < start.shape[1] else right[:2].T
            np.testing.assert_allclose(used[at] @ used[at].T, leading @ leading.T, atol=1e-5)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_when_a_basis_is_due_shows_in_its_matrix_alone(at, value):
    """Without an error: the loss tells the run. The basis before stays; without one the next step begins."""
    params = matrices(SHAPES)
    optimizer, twin = Fira(params, rank=2, interval=2), Fira(matrices(SHAPES), rank=2, interval=2)
    stepped(optimizer, range(at))
    basis = optimizer.state[params[1]].get("basis")
    stepped(twin, range(4))
    for step in range(at, 4):
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        if step == at:
            params[1].grad[0, 0] = value
        optimizer.step()
        if step == at:
            assert optimizer.state[params[1]].get("basis") is basis
    for place, (param, plain) in enumerate(zip(params, twin.param_groups[0]["params"], strict=True)):
        assert torch.equal(param, plain) if place != 1 else not param.isfinite().all()
    assert int(optimizer.state[params[1]]["step"]) == (3 if at == 0 else 4)


def test_of_a_column_at_full_rank_it_is_adam():
    """P is 1 or −1, and nothing is left for S."""
    ours, adam = matrices([(9, 1)]), matrices([(9, 1)])
    stepped(Fira(ours, lr=0.1, rank=1, interval=100), range(5))
    stepped(torch.optim.Adam(adam, lr=0.1), range(5))
    torch.testing.assert_close(ours, adam, rtol=0, atol=2e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_steps_are_those_of_the_authors_package(alpha):
    """Without decay, which comes in another order there."""
    theirs = pytest.importorskip("fira")
    ours, other = matrices(SHAPES), matrices(SHAPES)
    stepped(Fira(ours, lr=0.01, rank=2, interval=3, alpha=alpha), range(8))
    group = {"params": other, "rank": 2, "proj_type": "std", "update_proj_gap": 3, "alpha": alpha}
    stepped(theirs.FiraAdamW([group], lr=0.01, eps=1e-8, no_deprecation_warning=True), range(8))
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
