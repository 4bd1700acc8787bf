"""The fast forms do what the plain ones do, and compile once."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from own_parts import Cube
from stepping import frugal, matrices, parameters, same, stepped
from torch._dynamo.utils import counters

from adafrugal.optim import Frugal, LinearDecay, choices, rules
from adafrugal.optim.kernels import compiled, lists
from adafrugal.optim.rules import Free, Rates
from adafrugal.optim.state_free import SignSGD

SHAPES = [(48, 40), (40, 48), (64, 64), (33, 65), (64, 64), (1, 1100), (100, 100), (5, 7), (48, 40), (96, 40), (50, 80)]


def trained(device="cpu", dtype=torch.float32, **settings):
    how = {"weight_decay": 0.1, "interval": 9, "split_lr_scale": 0.5, "state_free_lr_scale": 0.3, **settings}
    optimizer = frugal(matrices(SHAPES, dtype, device=device), density=LinearDecay(0.9, 0.1, steps=20), **how)
    for step in range(24):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        stepped(optimizer, [step])
    return [p.detach().cpu() for p in parameters(optimizer)]


@pytest.fixture(autouse=True)
def together(monkeypatch, request):
    """The number of tensors in a compiled call: four, which compile in less time, or what a test asks for."""
    monkeypatch.setattr(compiled, "_TOGETHER", getattr(request, "param", 4))
    compiled._fillers.cache_clear()
    yield
    compiled._fillers.cache_clear()


@pytest.mark.parametrize(
    ("subspace", "state_free", "dtype", "together"),
    [
        *itertools.product(
            ["blocks", "slab", "columns", "rows", "randk", "svd"], ["signsgd", "sgd"], [torch.float32], [4]
        ),
        ("blocks", "signsgd", torch.float32, 16),
        ("blocks", "signsgd", torch.float64, 4),
        ("blocks", "none", torch.float32, 4),
    ],
    indirect=["together"],
)
def test_compiled_and_plain_agree(subspace, state_free, dtype, together):
    rates = {"subspace": subspace, "state_free": state_free, "dtype": dtype}
    plain = trained(fused=False, compile=False, **rates)
    fast = trained(fused=True, compile=True, **rates)
    # a sign may differ where a residual is rounding noise; nothing here is
    torch.testing.assert_close(plain, fast, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "given", "expected"),
    [(2**24, None, True), (2**24 - 4, None, False), (2**24, False, False), (4, True, True)],
)
def test_large_groups_are_compiled_and_small_ones_are_not(entries, given, expected):
    group = {"params": [torch.empty(4, entries // 4, device="meta")], "compile": given}
    assert compiled.compiles(group) is expected


@pytest.mark.parametrize("state_free", [rule for rule, sees in choices.SEEN_BY.items() if choices.goes_by_entry(sees)])
@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "svd"])
def test_what_a_gpu_launches_together_is_what_a_cpu_does_one_by_one(subspace, state_free, monkeypatch):
    settings = {"subspace": subspace, "state_free": state_free, "compile": False}
    plain, launches, foreach = trained(**settings), [], lists._foreach
    monkeypatch.setattr(lists, "_costs_a_launch", lambda tensor: True)
    monkeypatch.setattr(lists, "_AT_ONCE", 5000)
    monkeypatch.setattr(lists, "_foreach", lambda *given: (launches.append(given[1]), foreach(*given)))
    assert same(trained(**settings), plain)
    assert all(len(targets) == 1 or sum(t.numel() for t in targets) <= 5000 for targets in launches)
    assert max(map(len, launches)) > (1 if subspace == "blocks" else 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rule_without_fast_forms_is_applied_in_its_plain_form(compiled, monkeypatch):
    monkeypatch.setattr(lists, "_costs_a_launch", lambda tensor: True)
    scales = [None, torch.tensor([[0.0, 1.0] * 20])]
    updates = [Free(torch.randn(48, 40), torch.randn(48, 40), scale) for scale in scales]
    expected, rates = [update.target.clone() for update in updates], Rates(lr=0.01, decay=0.1)
    for target, update in zip(expected, updates, strict=True):
        rules.decay_(target, rates)
        target.add_(update.grad**3 * (1 if update.scale is None else update.scale), alpha=-rates.lr)
    lists.state_free(Cube(), updates, rates, fused=True, compiled=compiled)
    assert same([update.target for update in updates], expected)


def test_where_nothing_can_be_compiled_it_says_so_once_and_goes_on(monkeypatch):
    def broken(*_, **__):
        def fail(*_):
            raise RuntimeError("no compiler found\nand much more")

        return fail

    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = trained(compile=True)
    compiled._compiled.cache_clear()
    assert [str(w.message) for w in caught] == [
        "torch.compile does not work here (no compiler found); the plain form is used"
    ]
    torch.testing.assert_close(got, trained(compile=False))


@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "rows", "randk", "randperm", "random"])
def test_transposed_weights_and_gradients_are_updated_like_any_other(subspace):
    torch.manual_seed(0)
    start, grads, ends = torch.randn(48, 40), torch.randn(6, 48, 40), []
    lay_out = (lambda t: t.clone(), lambda t: t.t().contiguous().t())
    for of_weight, of_grad in itertools.product(lay_out, repeat=2):
        param, density = torch.nn.Parameter(of_weight(start)), 1.0 if subspace == "blocks" else 0.5
        optimizer = frugal([param], density=density, subspace=subspace, compile=True)
        for grad in grads:
            param.grad = of_grad(grad)
            optimizer.step()
        ends.append(param.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)


def straighten_weight(param, state):
    param.data = param.data.contiguous()


def turn_moments(param, state):
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name].t().contiguous().t() if state[name].ndim == 2 else state[name]


@pytest.mark.filterwarnings("ignore:no group says split=True")
@pytest.mark.parametrize(("is_turned", "change"), [(True, straighten_weight), (False, turn_moments)])
@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "rows", "randk", "svd", None])
def test_moments_that_lie_otherwise_than_their_weights_are_updated_alike(subspace, is_turned, change):
    ends = []
    for fused in (False, True):
        (param,) = params = matrices([(4, 6)])
        param.data = param.data.t() if is_turned else param.data
        group = {"params": params, "split": False}
        if subspace:
            density = 1.0 if subspace == "blocks" else 0.5
            group |= {"split": True, "subspace": subspace, "density": density, "state_free": "sgd"}
        optimizer = stepped(Frugal([group], lr=0.1, fused=fused, compile=False), range(3))
        change(param, optimizer.state[param])
        ends.append(stepped(optimizer, range(3, 6)).param_groups[0]["params"][0].detach())
    torch.testing.assert_close(*ends)


def test_empty_tensors_are_chunked_too():
    empty, some = (Free(torch.zeros(n, 4), torch.zeros(n, 4)) for n in (0, 3))
    assert lists._chunks([empty, some]) == [[empty, some]]


@pytest.fixture
def graphs_alone(monkeypatch):
    """torch.compile with its graphs and guards, but without generated code, which takes seconds."""
    compiled._compiled.cache_clear()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    compiled._compiled.cache_clear()


@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "rows"])
def test_it_compiles_at_most_three_times_however_the_density_moves(subspace, graphs_alone):
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trained(subspace=subspace, compile=True)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_after_a_reset_of_torchs_compiler_other_sizes_are_updated_too(graphs_alone):
    def updated(sizes):
        updates = [Free(torch.zeros(n), torch.ones(n)) for n in sizes]
        lists.state_free(SignSGD(), updates, Rates(lr=1.0), fused=True, compiled=True)
        return all(torch.equal(target, -torch.ones_like(target)) for target, *_ in updates)

    assert updated([4096, 5000])
    torch.compiler.reset()
    assert updated([4096] * 3 + [6400])
    assert updated([6400, 4096, 1500, 9000])


def test_the_sign_of_no_number_is_none(graphs_alone):
    (grad, target), signs = torch.ones(2, 4096), torch.ones(4096)
    grad[:3] = signs[:3] = torch.tensor([float("nan"), -2.0, 0.0])
    lists.state_free(SignSGD(), [Free(target.zero_(), grad)], Rates(lr=1.0), fused=True, compiled=True)
    torch.testing.assert_close(target, -signs.sign().where(~signs.isnan(), signs), equal_nan=True)


def test_tensors_that_share_storage_are_not_compiled_together(graphs_alone):
    whole = torch.zeros(2, 60, 40)
    updates = [Free(target, torch.ones(60, 40)) for target in whole]
    lists.state_free(SignSGD(), updates, Rates(lr=1.0), fused=True, compiled=True)
    assert torch.equal(whole, -torch.ones(2, 60, 40))


@pytest.mark.gpu
@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "rows", "randk", "svd"])
def test_on_a_gpu_fast_forms_agree_with_plain_ones_on_a_cpu(subspace):
    here = trained(fused=False, compile=False, subspace=subspace, state_free="sgd")
    there = trained(device="cuda", subspace=subspace, state_free="sgd")
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("state_free", ["whiten", "swan", "sinkhorn", "rownorm", "colnorm"])
@pytest.mark.parametrize("subspace", ["blocks", "columns", "randk", "svd"])
def test_on_a_gpu_rules_that_see_matrices_agree_with_those_on_a_cpu(subspace, state_free):
    """A whitened direction up to the bfloat16 of its products: of a root mean square of 1 about a hundredth.

    With svd the bases differ by rounding, in which Adam's first step, nearly a sign, is large where R is small: 2e-4 on
    an H200.
    """
    how = {"lr": 1.0, "subspace": subspace, "state_free": state_free}
    ends = [parameters(stepped(frugal(matrices(SHAPES, device=on), **how), [0])) for on in ("cpu", "cuda")]
    for here, there in zip(*ends, strict=True):
        error = (here - there.cpu()).square().mean().sqrt()
        assert error < (0.03 if state_free in ("whiten", "swan") else 1e-3 if subspace == "svd" else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.0}, *({"state_full": rule} for rule in ("lion", "sgdm")),
     *({"state_free": rule} for rule in ("swan", "sinkhorn"))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("subspace", ["blocks", "slab", "columns", "svd"])
def test_a_step_on_a_gpu_waits_for_nothing(subspace, settings):
    more = {"subspace": subspace, "density": 0.5, **settings}
    optimizer = stepped(frugal(matrices(SHAPES, device="cuda"), **more), [0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
