"""The code of moments in 8 bits, against its formula entry by entry."""

import math

import pytest
import torch

from adafrugal.optim.eight_bits import BLOCK, decode, encode, zeros

SHAPES = [(3, 2 * BLOCK + 7), (5, 40), (700,), (2, 3, 100)]


def values(shape, is_signed=True, seed=0):
    """Values over nine orders of magnitude, some 0, one block nothing else."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator) * 10 ** (-9 * torch.rand(shape, generator=generator))
    made.view(-1)[::13] = 0
    made[-1] *= 0 if made.ndim > 1 else 1
    return made if is_signed else made.abs()


def by_hand(row, is_signed):
    """Codes to the nearest of one row, and what they stand for, from the formula in Python floats."""
    most, codes, found = 127 if is_signed else 255, [], []
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        scale = max(map(abs, block))
        for x in block:
            between = (abs(x) / scale) ** 0.25 * most if scale else 0.0
            code = min(
                (math.floor(between), math.ceil(between)), key=lambda c: abs(abs(x) - scale * (c / most) ** 4)
            )
            code = max(code, 1) if x > 0 and not is_signed else code
            codes.append(math.copysign(code, x))
            found.append(math.copysign(scale * (code / most) ** 4, x))
    return codes, found


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_values_are_those_of_the_formula(shape, is_signed):
    given = values(shape, is_signed)
    codes, scales = encode(given, is_signed)
    back = decode(codes, scales)
    assert (codes.dtype, codes.shape) == (torch.int8 if is_signed else torch.uint8, given.shape)
    assert (back.dtype, back.shape) == (torch.float32, given.shape)
    rows = given.view(1, -1) if given.ndim == 1 else given.flatten(1)
    assert scales.shape == (len(rows), math.ceil(rows.shape[1] / BLOCK))
    expected = [by_hand(row, is_signed) for row in rows.tolist()]
    differ = codes.view(len(rows), -1).float() - torch.tensor([code for code, _ in expected])
    assert (differ != 0).float().mean() < 1e-3, "all but values that lie in the middle, by the last digit"
    assert differ.abs().max() <= 1
    same = differ.view(given.shape) == 0
    expected = torch.tensor([value for _, value in expected]).view(given.shape)
    torch.testing.assert_close(back[same], expected[same], rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_error_is_half_the_distance_of_neighbours_and_the_largest_of_a_block_is_exact(is_signed):
    given = values((4, BLOCK), is_signed)[:3]
    codes, scales = encode(given, is_signed)
    back, most = decode(codes, scales), 127 if is_signed else 255
    share = (given.abs() / scales) ** 0.25
    half_step = scales * (((share + 1 / most) ** 4 - share**4) / 2 + most**-4.0)
    assert ((back - given).abs() <= half_step).all()
    largest = given.abs().argmax(1, keepdim=True)
    assert torch.equal(back.gather(1, largest), given.gather(1, largest))


@pytest.mark.parametrize("is_signed", [True, False])
def test_what_was_decoded_has_the_same_codes_again(is_signed):
    codes, scales = encode(values((6, 600), is_signed), is_signed)
    assert all(map(torch.equal, encode(decode(codes, scales), is_signed), (codes, scales)))


def test_noise_rounds_to_both_neighbours_with_the_mean_kept():
    given = values((1, BLOCK))
    down, up = decode(*encode(given, True, torch.full(given.shape, 2**16 - 1))), decode(*encode(given, True, 0 * given))
    assert ((down - given) * given.sign() <= 1e-6 * given.abs()).all()
    assert ((up - given) * given.sign() >= -1e-6 * given.abs()).all()
    generator = torch.Generator().manual_seed(0)
    drawn = [decode(*encode(given, True, torch.randint(2**16, given.shape, generator=generator))) for _ in range(2000)]
    mean, widest = torch.stack(drawn).double().mean(0), (up - down).abs()
    assert ((mean - given).abs() <= 5 * widest / 2 / 2000**0.5 + 1e-6 * given.abs()).all()


def test_a_second_moment_above_0_never_becomes_0():
    given = torch.tensor([[1.0, 1e-30, 0.0]])
    back = decode(*encode(given, False, torch.full(given.shape, 2**16 - 1)))
    assert back[0, 1] > 0
    assert back[0, 2] == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_block_and_in_no_other(wrong):
    given = torch.ones(2, 2 * BLOCK)
    given[1, 3] = wrong
    back = decode(*encode(given, True))
    assert not back[1, :BLOCK].isfinite().any()
    assert back[0].isfinite().all()
    assert back[1, BLOCK:].isfinite().all()


def test_zeros_take_a_byte_an_entry_and_four_a_block():
    codes, scales = zeros(torch.ones(3, BLOCK + 1), is_signed=False)
    assert codes.nbytes + scales.nbytes == 3 * (BLOCK + 1) + 4 * 3 * 2
    assert torch.equal(decode(codes, scales), torch.zeros(3, BLOCK + 1))
