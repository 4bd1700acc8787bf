"""SCALE, against its formula."""

import copy

import numpy as np
import pytest
import torch
from stepping import matrices, parameters, same, saved_and_loaded, stepped

from adafrugal.optim import state_bytes
from adafrugal.optim.baselines.scale import Scale

SHAPES = [(6, 10), (10, 6), (1, 7), (8, 1)]


def made(params, **options):
    """The first half of the matrices by columns, without a momentum; the rest by rows, with one."""
    half = len(params) // 2
    groups = [{"params": params[:half], "dim": -2}, {"params": params[half:], "momentum": 0.8}]
    return Scale(groups, lr=0.1, **options)


def test_steps_are_those_of_the_formula():
    params = matrices(SHAPES, torch.float64)
    expected = [p.detach().numpy().copy() for p in params]
    momenta = [np.zeros_like(p) for p in expected]
    optimizer = made(params, weight_decay=0.2)
    for step in range(3):
        stepped(optimizer, [step])
        for i, param in enumerate(params):
            grad, axis = param.grad.numpy(), 0 if i < 2 else 1
            momenta[i] = grad if i < 2 else 0.8 * momenta[i] + 0.2 * grad
            root = np.sqrt((momenta[i] ** 2).mean(axis, keepdims=True))
            expected[i] = expected[i] * (1 - 0.1 * 0.2) - 0.1 * momenta[i] / root
    for param, wanted in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), wanted, rtol=1e-12)


def test_copies_and_round_trips_continue_bit_for_bit():
    optimizer = stepped(made(matrices(SHAPES)), range(2))
    twin, again = copy.deepcopy(optimizer), made(copy.deepcopy(parameters(optimizer)))
    again.load_state_dict(saved_and_loaded(optimizer))
    ends = [parameters(stepped(each, range(2, 5))) for each in (optimizer, twin, again)]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_only_a_momentum_is_state():
    assert state_bytes(stepped(made(matrices(SHAPES)), [0])) == {"2": {"moments": 28}, "3": {"moments": 32}}


@pytest.mark.parametrize(("option", "value"), [("momentum", 1.5), ("momentum", -0.1), ("dim", 3), ("lr", "fast")])
def test_an_option_out_of_its_range_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value!r}; allowed: "):
        Scale([{"params": matrices(SHAPES), option: value}])


def test_a_momentum_of_another_shape_is_refused():
    saved = stepped(made(matrices(SHAPES)), [0]).state_dict()
    with pytest.raises(ValueError, match=r"matrix \[7, 1\] has momentum_buffer of shape \[1, 7\], and Scale .* needs"):
        made(matrices([(6, 10), (10, 6), (7, 1), (8, 1)])).load_state_dict(saved)


def test_lines_of_zeros_stay_and_vectors_are_refused():
    (param,) = matrices([(3, 4)])
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    param.grad[1] = 5.0
    Scale([param], lr=0.1).step()
    torch.testing.assert_close(before - param, torch.tensor([[0.0] * 4, [0.1] * 4, [0.0] * 4]))
    with pytest.raises(ValueError, match=r"Scale is given a tensor of shape \[4\]; allowed: matrices"):
        Scale(matrices([(4,)]))
