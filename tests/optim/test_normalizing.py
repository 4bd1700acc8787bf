"""The rules that normalize whole matrices, against their definitions: by a singular value decomposition, by sums."""

import math

import pytest
import torch

from adafrugal.optim import normalizing
from adafrugal.optim.state_free import STATE_FREE

RULES = {kind: STATE_FREE[kind]() for kind in ("whiten", "swan", "sinkhorn", "rownorm", "colnorm")}
SHAPES = [(24, 24), (64, 24), (24, 64)]


def gradient(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_keeps_the_singular_vectors_and_moves_the_values_to_1(shape):
    left, values, right = torch.linalg.svd(gradient(*shape), full_matrices=False)
    values = torch.linspace(1, 0.02, len(values), dtype=torch.float64)
    found = normalizing.whitened(left * values @ right, 5) / max(shape) ** 0.5
    moved = left.mT @ found @ right.mT
    torch.testing.assert_close(moved, torch.diag(moved.diagonal()), rtol=0, atol=1e-12)
    assert moved.diagonal().min() > 0.6
    assert moved.diagonal().max() < 1.25


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(256, 256), (688, 256), (256, 688)])
@pytest.mark.parametrize(("least", "apart"), [(1e-2, 0.04), (1e-3, 0.08)])
def test_products_in_bfloat16_give_nearly_the_direction_of_float32(least, apart, shape, device, monkeypatch):
    """Of gradients whose singular values fall evenly to `least` of the largest: as on a GPU, and on one.

    Directions differ by a few hundredths of their size, singular values by less, and the descent along G, which is the
    inner product of G and D at one size, by a thousandth.
    """
    left, values, right = torch.linalg.svd(gradient(*shape), full_matrices=False)
    grad = (left * torch.logspace(0, math.log10(least), len(values), dtype=torch.float64) @ right).float()
    plain = normalizing.whitened(grad, 5)
    if device == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = normalizing.whitened(grad.to(device), 5).cpu()
    assert 0.001 < (found - plain).norm() / plain.norm() < apart
    one, other = (torch.linalg.svdvals(each.double()) / max(shape) ** 0.5 for each in (plain, found))
    torch.testing.assert_close(one, other, rtol=0, atol=0.03)
    one, other = ((grad * each).sum() / grad.norm() / each.norm() for each in (plain, found))
    torch.testing.assert_close(one, other, rtol=0, atol=0.002)


def test_a_step_of_newton_schulz_by_hand():
    """A matrix of singular values .8 and .6 has norm 1, and a step makes s of them 3.4445s − 4.775s³ + 2.0315s⁵."""
    found = normalizing.whitened(torch.diag(torch.tensor([0.8, 0.6], dtype=torch.float64)), 1) / 2**0.5
    assert found.diagonal().tolist() == pytest.approx([0.97648192, 1.19326944])


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_have_a_root_mean_square_of_1(shape):
    grad = gradient(*shape)
    torch.testing.assert_close(normalizing.lines(grad, -1).square().mean(-1), torch.ones(shape[0]).double())
    torch.testing.assert_close(normalizing.lines(grad, -2).square().mean(-2), torch.ones(shape[1]).double())
    rows = normalizing.standardized_rows(grad + 3)
    torch.testing.assert_close(rows, (grad - grad.mean(1, keepdim=True)) / grad.std(1, correction=0, keepdim=True))


def test_sinkhorn_normalizes_both_rows_and_columns():
    grad = gradient(24, 64)
    grad[3] *= 100
    grad[:, 5] *= 100
    found = normalizing.sinkhorn(grad, 5)
    torch.testing.assert_close(found.square().mean(0), torch.ones(64).double())
    torch.testing.assert_close(found.square().mean(1), torch.ones(24).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(normalizing.sinkhorn(grad, 1), normalizing.lines(normalizing.lines(grad, 1), 0))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_have_the_size_of_signs_whatever_the_size_of_the_gradient(kind, dtype):
    grad = gradient(96, 64).to(dtype)
    found = RULES[kind](grad)
    assert found.dtype == dtype
    assert 0.8 < found.square().mean().sqrt() < 1.1
    for scale in (2.0**-40, 2.0**40):
        assert torch.equal(RULES[kind](grad * scale), found)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-23, 1e-20, 1e18, 1e22, 1e30])
def test_no_gradient_is_too_small_or_too_large_to_have_its_direction(kind, scale):
    """Squares of such numbers underflow or overflow in float32; 1e-40 itself is subnormal there."""
    grad = (gradient(48, 64) * scale).float()
    grad[3] *= 1e-3
    found, exact = RULES[kind](grad), RULES[kind](grad.double())
    torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(exact, RULES[kind](grad.double() / scale), rtol=1e-9, atol=1e-9)
    if RULES[kind].sums_rows:
        pieces = [grad[:20], grad[20:20], grad[20:]]  # as three processes have them
        parts = RULES[kind].of_rows(pieces, [48] * 3, lambda squares: [sum(squares)] * 3)
        torch.testing.assert_close(torch.cat(parts), found, rtol=1e-4, atol=1e-5)


TINY_LINES = [("rownorm", 0), ("swan", 0), ("sinkhorn", 0), ("colnorm", 1), ("sinkhorn", 1)]


@pytest.mark.parametrize(("kind", "dim"), TINY_LINES)
def test_a_tiny_line_has_the_direction_that_it_would_have_alone(kind, dim):
    grad, tiny = gradient(24, 24).float(), torch.ones(24)
    tiny[3] = 1e-24
    found = RULES[kind](grad * (tiny[:, None] if dim == 0 else tiny))
    if kind == "sinkhorn":
        assert 0.5 < found.select(dim, 3).square().mean().sqrt() < 1.5
        assert found.abs().max() < 10
    else:
        torch.testing.assert_close(found, RULES[kind](grad), rtol=1e-3, atol=1e-4)


def test_rows_that_are_constant_but_for_rounding_have_no_deviations_to_whiten():
    grad = gradient(6, 700).float()
    grad[2:4] = torch.tensor([[0.1], [1e20]])
    found = normalizing.standardized_rows(grad)
    assert torch.equal(found[2:4], torch.zeros(2, 700))
    grad[2] += 1e-5 * grad[0]
    assert normalizing.standardized_rows(grad)[2].square().mean() == pytest.approx(1, rel=1e-3)
    assert RULES["swan"](torch.ones(4, 5) * 0.1).abs().max() == 0


def test_deviations_that_bfloat16_can_tell_from_rounding_stay():
    row = 1 + 0.03 * torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    found = normalizing.standardized_rows(row.bfloat16()).float()
    assert found.square().mean() == pytest.approx(1, rel=0.02)
    assert torch.equal(normalizing.standardized_rows(torch.full((2, 700), 0.1).bfloat16()).float(), torch.zeros(2, 700))


@pytest.mark.parametrize("kind", RULES)
def test_zeros_stay_zeros_and_nan_shows(kind):
    grad = torch.zeros(300, 200)
    assert torch.equal(RULES[kind](grad), grad)
    grad[0] = 1.0
    assert RULES[kind](grad).isfinite().all()
    grad[0, 0] = torch.nan
    assert RULES[kind](grad).isnan().any()


@pytest.mark.parametrize("kind", RULES)
def test_rules_are_odd_as_maximize_needs(kind):
    grad = gradient(12, 9)
    assert torch.equal(RULES[kind](-grad), -RULES[kind](grad))


@pytest.mark.parametrize("kind", RULES)
def test_a_stack_has_the_directions_of_its_matrices(kind):
    stack = gradient(3, 12, 9)
    torch.testing.assert_close(RULES[kind](stack), torch.stack([RULES[kind](grad) for grad in stack]))
