"""The one-pass kernel does what the plain rules do; on a CPU in Triton's interpreter."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import parameters, saved_and_loaded, stepped

from adafrugal.optim import Frugal, LinearDecay, UpdateInBackward, eight_bits, rounding, storage
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


# -- moments in 8 bits ------------------------------------------------------------------------------------------------

LONG = [(16, 600), (13, 29), (5, 1030), (20, 256), (1, 70)]  # rows of several blocks, whole ones or not
CODES = {"lr": 0.01, "weight_decay": 0.1, "density": 0.5, "interval": 3, "state_dtype": "int8", "compile": False}


def pair(device, shapes, split=True, dtype=torch.float32, **options):
    """The plain form on a CPU, and the kernel, of the same parameters."""
    made = []
    for fused, place in ((False, "cpu"), (True, device)):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(place, dtype)) for s in shapes]
        given = options if split else {k: v for k, v in options.items() if k not in ("density", "interval")}
        made.append(Frugal([{"params": params, "split": split}], fused=fused, **given))
    return made


def step_from_the_same(plain, fast, generator):
    """Give the kernel the plain form's weights and state, then let both make a step; yield what each has now."""
    pairs = [*zip(*(optimizer.param_groups[0]["params"] for optimizer in (plain, fast)), strict=True)]
    for ours, theirs in pairs:
        theirs.data.copy_(ours)
        for name, value in fast.state[theirs].items():
            if isinstance(value, torch.Tensor) and value.shape == plain.state[ours][name].shape:
                value.copy_(plain.state[ours][name])
        ours.grad = torch.randn(ours.shape, generator=generator).to(ours.dtype)
        theirs.grad = ours.grad.to(theirs.device)
    for optimizer in (plain, fast):
        optimizer.step()
    for ours, theirs in pairs:
        yield *(p.detach().cpu() for p in (ours, theirs)), plain.state[ours], fast.state[theirs]


@pytest.mark.filterwarnings("ignore:no group says split=True")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("subspace", "options"),
    [
        *itertools.product(["blocks", "slab", "rows", "columns"], [{}, {"state_full": "lion"}]),
        *itertools.product(["rows", "columns", "slab"], [{"on_refresh": "keep"}, {"on_refresh": "keep_overlap"}]),
        ("randperm", {"state_full": "sgdm", "state_free": "none"}),
        ("blocks", {"split": False, "shapes": [(32, 3, 5, 20), *LONG], "on_refresh": "reset"}),
        *itertools.product(["slab", "columns"], [{"dtype": torch.bfloat16, "stochastic_rounding": True}]),
    ],
    ids=str,
)  # fmt: skip
def test_of_the_same_codes_it_makes_those_of_the_plain_form(device, subspace, options, codes):
    plain, fast = pair(device, **{"subspace": subspace, "shapes": LONG} | CODES | options)
    generator, compared = torch.Generator().manual_seed(1), 0
    for _ in range(4):
        for ours, theirs, state, other in step_from_the_same(plain, fast, generator):
            is_exact = ours.dtype == torch.float32
            torch.testing.assert_close(theirs, ours, rtol=1e-5 if is_exact else 2**-7, atol=1e-5 if is_exact else 1e-3)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
                    differ = (other[name].cpu().double() - value.double()).abs()
                    if name in storage.in_codes(state, plain.param_groups[0]):
                        assert differ.sum() <= 1e-3 * differ.numel() + 2, "by noise of 16 bits: no value is far away"
                        assert differ.numel() == 0 or differ.max() <= 1
                        compared += differ.numel()
                    else:
                        assert (differ <= 2e-6 * value.abs()).all(), name
    assert compared > 1000


@pytest.mark.filterwarnings("ignore:the saved state replaces settings")
@pytest.mark.parametrize("written_by", [0, 1])
def test_a_state_that_one_form_has_saved_is_read_by_the_other(written_by, codes):
    writer = stepped(pair("cpu", LONG, subspace="columns", **CODES)[written_by], range(2))
    saved, ends = saved_and_loaded(writer), []
    for reader in pair("cpu", LONG, subspace="columns", **CODES):
        fused = reader.param_groups[0]["fused"]
        reader.load_state_dict(saved)
        reader.param_groups[0]["fused"] = fused
        for ours, theirs in zip(parameters(reader), parameters(writer), strict=True):
            ours.data.copy_(theirs)
        ends.append(parameters(stepped(reader, [2])))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0, 2**32 - 700])
def test_codes_are_drawn_by_seed_step_tensor_and_entry_and_keep_the_mean(device, first, codes):
    """With β = 0 the moments are g and g², whatever they were."""
    rows, number = 200, 5
    row = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 10 ** (-4 * torch.linspace(0, 1, 300))
    row[::7] = 0
    param = torch.nn.Parameter(torch.zeros(rows, 300, device=device))
    param.grad = row.expand(rows, -1).contiguous().to(device)
    state, exact, means = {"step": torch.zeros((), device=device)}, (param.grad, param.grad**2), []
    for name in ("exp_avg", "exp_avg_sq"):
        state |= zip((name, f"{name}_scale"), eight_bits.zeros(param, name == "exp_avg"), strict=True)
    parts = [tables.Part("full", 0, param.numel(), first)]
    table = tables.Table([tables.Member(param, state, parts, number, 0)], "adamw", "none", stochastic=False)
    for key in (3, 2**31 - 1, 77):
        table.launch(Rates(0.0, betas=(0.0, 0.0)), 0.0, key)
        means.append([eight_bits.decode(state[name], state[f"{name}_scale"]) for name in ("exp_avg", "exp_avg_sq")])
        for role, (name, value) in enumerate(zip(("exp_avg", "exp_avg_sq"), exact, strict=True), 1):
            noise = rounding.noise(key, number, role, first, value)
            found, scales = eight_bits.encode(value, role == 1, noise)
            torch.testing.assert_close(state[f"{name}_scale"], scales, rtol=1e-6, atol=0)
            assert (state[name] != found).float().mean() < 1e-3
    for role, value in enumerate(exact):
        drawn = torch.cat([each[role] for each in means])
        ends = (torch.full(value.shape, noise, device=device) for noise in (0, 2**16 - 1))
        up, down = (eight_bits.decode(*eight_bits.encode(value, role == 0, noise)) for noise in ends)
        most = 5 * (up - down)[0].abs() / 2 / len(drawn) ** 0.5
        assert ((drawn.mean(0) - value[0]).abs() <= most + 1e-6 * value[0].abs()).all()
    assert (state["exp_avg_sq"][0, row != 0] > 0).all()
    assert (state["exp_avg_sq"][:, ::7] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e25])
def test_what_is_not_finite_shows_in_its_block_as_in_the_plain_form(device, wrong, codes):
    ends = []
    for optimizer in pair(device, [(4, 600)], **CODES | {"density": 1.0}):
        (param,) = optimizer.param_groups[0]["params"]
        for _ in range(2):
            param.grad = torch.ones_like(param)
            param.grad[1, 300] = wrong
            optimizer.step()
        state = {name: value.cpu() for name, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
        moments = [eight_bits.decode(state[name], state[f"{name}_scale"]) for name in ("exp_avg", "exp_avg_sq")]
        ends.append([value.isfinite() for value in (param.detach().cpu(), *moments)])
    assert all(map(torch.equal, *ends))
    assert not ends[0][2][1, 256:512].any()
    assert ends[0][2].sum() == 4 * 600 - 256
