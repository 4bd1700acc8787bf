"""What a group may say, and what becomes of it."""

import pytest
import torch
from stepping import events_of, frugal, matrices, stepped
from torch import nn

from adafrugal.optim import Frugal, LinearDecay
from adafrugal.optim.subspaces import SUBSPACES

# -- keys of a group --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("densty", "density"), ("weigth_decay", "weight_decay"), ("intervall", "interval"), ("beta", "betas"),
        ("Subspace", "subspace"), ("sub_space", "subspace"), ("statefree", "state_free"), ("maximise", "maximize"),
        ("split_scale", "split_lr_scale"), ("layer", "layers"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_with_the_name_that_was_meant(key, meant):
    with pytest.raises(ValueError, match=f"the key '{key}'; did you mean '{meant}'"):
        Frugal([{"params": matrices(), "split": True, key: 0.5}])


FOREIGN_KEYS = [
    "name", "group_name", "rule", "initial_lr", "swa_lr", "max_lr", "min_lr", "base_lr", "max_momentum",
    "base_momentum", "lr_scale", "lr_mult", "wd_mult", "weight_decay_scale", "base_weight_decay", "layer_id",
    "is_expert", "decoupled_weight_decay", "warmup_steps",
]  # fmt: skip


def test_keys_of_schedulers_and_trainers_are_kept():
    foreign = dict.fromkeys(FOREIGN_KEYS, 0.5) | {"amsgrad": False, "differentiable": False, "foreach": None}
    (group,) = Frugal([{"params": matrices(), "split": True, **foreign}]).param_groups
    assert foreign.items() <= group.items()


def test_any_key_may_be_added_later():
    optimizer = frugal(matrices())
    optimizer.param_groups[0] |= {"layer": 3, "momentum": 0.9}
    again = frugal(matrices())
    again.load_state_dict(stepped(optimizer, range(2)).state_dict())
    assert again.param_groups[0]["layer"] == 3


@pytest.mark.parametrize("key", ["amsgrad", "nesterov", "momentum", "dampening", "differentiable"])
def test_options_of_torchs_optimizers_that_it_lacks_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} is True, which Frugal does not have; leave it out"):
        Frugal([{"params": matrices(), "split": True, key: True}])


def test_differentiable_is_refused_as_an_argument_too():
    with pytest.raises(ValueError, match="differentiable is True, which Frugal does not have"):
        frugal(matrices(), differentiable=True)
    frugal(matrices(), differentiable=False)


# -- maximize ---------------------------------------------------------------------------------------------------------

RULES = [{"state_free": rule} for rule in ("signsgd", "sgd", "none")] + [{"state_full": "lion"}, {"state_full": "sgdm"}]


@pytest.mark.parametrize("in_group", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("subspace", ["blocks", "columns", "svd"])
def test_maximize_is_descent_of_the_negative(subspace, rules, fused, in_group):
    how = {"subspace": subspace, "density": 0.5, "interval": 3, "weight_decay": 0.5, "lr": 0.01, "fused": fused}
    how |= {"state_free": "sgd"} | rules
    up, down = matrices([(6, 8), (8, 6)]), matrices([(6, 8), (8, 6)])
    maximize = {"maximize": True}
    group, arguments = (maximize, {}) if in_group else ({}, maximize)
    ascent = Frugal([{"params": up, "split": True, **group}], **how, **arguments)
    descent = Frugal([{"params": down, "split": True}], **how)
    for step in range(6):
        stepped(ascent, [step])
        for one, other in zip(up, down, strict=True):
            other.grad = -one.grad
        descent.step()
        torch.testing.assert_close(up, down, rtol=1e-5, atol=1e-6)


def test_maximize_in_one_group_leaves_the_others_alone():
    one, other, vector = (nn.Parameter(torch.zeros(4, 4)) for _ in range(3))
    groups = [{"params": [one], "split": True, "maximize": True}, {"params": [other], "split": True}]
    optimizer = Frugal([*groups, {"params": [vector], "maximize": True}], lr=1.0, density=1.0)
    for param in (one, other, vector):
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close([one, other, vector], [torch.ones(4, 4), -torch.ones(4, 4), torch.ones(4, 4)])


# -- a group that is added late ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "density"), [({}, 0.9), ({"steps": 4}, 0.5)])
def test_a_group_that_is_added_late_counts_its_own_steps_or_goes_on_from_those_it_is_given(steps, density):
    optimizer = stepped(frugal(matrices(), density=LinearDecay(1.0, 0.0, steps=10), interval=100), range(4))
    events = events_of(optimizer)
    optimizer.add_param_group({"params": matrices(seed=1), "split": True, **steps})
    stepped(optimizer, [4])
    assert optimizer.param_groups[0]["density_read"] == pytest.approx(0.5)
    assert optimizer.param_groups[1]["density_read"] == pytest.approx(density)
    assert ("refresh", 5) in events


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_steps_that_cannot_be_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}; allowed: a whole number, 0 or more"):
        Frugal([{"params": matrices(), "split": True, "steps": steps}])


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_complex_parameters_are_refused(fused, split):
    with pytest.raises(ValueError, match="parameter w is complex64; Frugal updates real numbers"):
        Frugal([{"params": [("w", nn.Parameter(torch.ones(4, 4) * 1j))], "split": split}], fused=fused)


@pytest.mark.filterwarnings("ignore:weights in 16 bits", "ignore:no group says split=True")
@pytest.mark.parametrize(
    ("dtype", "of_grad"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("subspace", [*SUBSPACES, None])
def test_a_gradient_of_another_dtype_is_used_as_it_is_and_moments_keep_theirs(subspace, dtype, of_grad):
    group = {"split": False}
    if subspace:
        group = {"split": True, "subspace": subspace, "density": 1.0 if subspace == "blocks" else 0.5}
        group["state_free"] = "sgd"
    (plain,), (mixed,) = (matrices([(12, 8)], dtype) for _ in range(2))
    mixed.grad_dtype = None
    pair = [Frugal([{"params": [param], **group}]) for param in (plain, mixed)]
    for step in range(3):
        grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        plain.grad, mixed.grad = grad.to(dtype), grad.to(of_grad)
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(plain, mixed)
    states = [optimizer.state[p] for optimizer, p in zip(pair, (plain, mixed), strict=True)]
    assert states[0].keys() == states[1].keys()
    for name in ("exp_avg", "exp_avg_sq"):
        assert states[1][name].dtype == torch.float32
        assert torch.equal(states[0][name], states[1][name])
