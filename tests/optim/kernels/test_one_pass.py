"""The one-pass kernel does what the plain rules do; on a CPU in Triton's interpreter."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adafrugal.optim import Frugal, LinearDecay, UpdateInBackward, rounding
from adafrugal.optim.kernels import tables
from adafrugal.optim.rules import Rates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(16, 24), (13, 29), (1, 70), (70, 1)]
# far from full rank, where the sign of a residual is rounding
IN_BATCHES = {"density": LinearDecay(0.5, 0.2, steps=4), "shapes": [(16, 24), (13, 29), (16, 24), (1, 70), (16, 24)]}
pytestmark = pytest.mark.usefixtures("kernel")


def trained(*, fused, device="cpu", dtype=torch.float32, shapes=SHAPES, steps=5, split=True, late=False, **options):
    """Return weights and states after some steps with noisy gradients, a falling density and moving selections."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    group = {"params": params, "split": split}
    if split:
        group |= {"split_lr_scale": 0.5, "state_free_lr_scale": 0.3, "interval": 2,
                  "density": options.pop("density", LinearDecay(0.9, 0.2, steps=4))}  # fmt: skip
    optimizer = Frugal([group], fused=fused, compile=False, **{"lr": 0.01, "weight_decay": 0.1} | options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] /= 1 + step
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator).to(device, dtype)
            param.grad = None if late and i == step % 3 else grad
        optimizer.step()
    states = [{k: v.cpu() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params]
    return [param.detach().cpu() for param in params], states


def assert_same(plain, fast, **tolerances):
    torch.testing.assert_close(fast, plain, **{"rtol": 1e-5, "atol": 1e-5} | tolerances)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("subspace", "rules"),
    [
        *itertools.product(["blocks", "slab", "rows", "columns", "randperm"], [{}]),
        *itertools.product(
            ["slab", "columns"],
            [{"state_full": "lion"}, {"state_full": "sgdm"}, {"state_free": "sgd"}, {"state_free": "none"}],
        ),
        *itertools.product(["rows", "columns", "slab"], [{"on_refresh": "keep"}, {"on_refresh": "keep_overlap"}]),
        ("columns", {"on_refresh": "reset_all"}), ("columns", {"stagger": 2}), ("rows", {"late": True}),
        ("columns", {"weight_decay": 0.0, "lr": 0.0}), ("columns", {"betas": (0.0, 0.0)}),
        *itertools.product(["svd", "random"], [IN_BATCHES, IN_BATCHES | {"state_free": "none", "on_refresh": "keep"}]),
        ({"kind": "svd", "side": "right"}, IN_BATCHES | {"state_free": "sgd", "state_full": "lion"}),
    ],
    ids=str,
)  # fmt: skip
def test_it_does_what_the_plain_rules_do(device, subspace, rules):
    beside = device if "svd" in str(subspace) else "cpu"  # singular vectors have no sign: a GPU may choose the other
    plain = trained(fused=False, device=beside, subspace=subspace, **rules)
    fast = trained(fused=True, device=device, subspace=subspace, **rules)
    assert_same(plain, fast)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_rounds_as_the_plain_form_does(device, dtype, state_dtype, stochastic):
    if dtype == torch.float32 and state_dtype is None:
        return
    options = {"dtype": dtype, "state_dtype": state_dtype, "stochastic_rounding": stochastic, "subspace": "columns"}
    options |= {"shapes": [(13, 29), (1, 70)], "steps": 4}
    with (
        pytest.warns(UserWarning, match="rounded to the nearest|cannot decrease") if lossy(**options) else nullcontext()
    ):
        plain, fast = trained(fused=False, **options), trained(fused=True, device=device, **options)
    # where float32 differs in its last bit, another neighbour may be stored
    assert_same(plain, fast, rtol=2**-7, atol=1e-3)
    pairs = zip(tensors(fast), tensors(plain), strict=True)
    assert all((ours == theirs).float().mean() > 0.97 for ours, theirs in pairs if ours.dtype != torch.float32)


def tensors(end):
    weights, states = end
    return [*weights, *(value for state in states for value in state.values())]


def lossy(dtype, state_dtype, stochastic_rounding, **_):
    return dtype == torch.float16 or not stochastic_rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0, 77, 2**32 - 100, 2**33 + 5])
def test_noise_is_by_seed_step_tensor_and_entry(device, first):
    """Decay alone: one product in float32, which all forms round alike, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 211, generator=generator).bfloat16()
    for number, key in itertools.product([0, 5], [3, 2**31 - 1]):
        expected = start.clone()
        rounding.Rounding(True, key, number, (first, 0)).store(expected, start.float() * 0.9, 0)
        param = torch.nn.Parameter(start.to(device))
        param.grad = torch.ones_like(param)
        member = tables.Member(param, None, [tables.Part("free", 0, param.numel())], number, first)
        tables.Table([member], "adamw", "none", stochastic=True).launch(Rates(0.0, decay=0.1), 0.0, key)
        assert torch.equal(param.detach().cpu(), expected)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), density=st.floats(0, 1),
    subspace=st.sampled_from(["blocks", "slab", "rows", "columns", "randperm"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape_density_and_dtype(shape, density, subspace, dtype):
    options = {"shapes": [shape, shape[::-1]], "subspace": subspace, "steps": 2, "lr": 0.1, "dtype": dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is selected of some shapes
        plain, fast = (trained(fused=fused, density=density, **options) for fused in (False, True))
    # where float32 differs in its last bit, another neighbour in bfloat16 may be stored
    assert_same(plain, fast, **{} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3})


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_are_not_split_are_updated_too(device):
    shapes = [(7,), (), (3, 4, 5), (16, 24)]
    plain = trained(fused=False, split=False, shapes=shapes)
    assert_same(plain, trained(fused=True, device=device, split=False, shapes=shapes))


@pytest.mark.parametrize("device", DEVICES)
def test_updates_in_the_backward_pass_are_the_same(device):
    ends = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(16, 24).to(device)) for _ in range(2)]
        optimizer = Frugal([{"params": params, "split": True}], lr=0.1, subspace="columns", interval=2)
        if in_backward:
            UpdateInBackward(optimizer)
        for _ in range(3):
            sum((param**2).sum() for param in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("t", [1, 2, 3, 10, 100, 124, 126, 1000, 12_345, 200_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95), (0.5, 0.9999)])
def test_bias_correction_keeps_its_digits(t, betas):
    """Steps from a state as it is after t − 1: the moments do not depend on the correction."""
    ends = []
    for fused in (False, True):
        param = torch.nn.Parameter(torch.zeros(16))
        optimizer = Frugal([{"params": [param], "split": False}], lr=1.0, betas=betas, eps=0.0, fused=fused)
        param.grad = torch.linspace(0.1, 3, 16)
        optimizer.step()
        optimizer.state[param]["step"].fill_(t - 1.0)
        param.data.zero_()
        optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [{"density": 0.0}, {"density": 1.0, "state_full": "lion"}], ids=str)
def test_a_gradient_that_is_no_number_shows_and_maximize_turns_the_rest(how, device):
    param = torch.nn.Parameter(torch.zeros(4, 8, device=device))
    optimizer = Frugal([{"params": [param], "split": True}], lr=1.0, maximize=True, **how)
    param.grad = torch.full_like(param, -2.0)
    param.grad[1, 3] = float("nan")
    optimizer.step()
    wanted = torch.full((4, 8), -1.0)
    wanted[1, 3] = float("nan")
    torch.testing.assert_close(param.detach().cpu(), wanted, equal_nan=True)
