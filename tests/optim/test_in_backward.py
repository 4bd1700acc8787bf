"""Updates within the backward pass, against the ordinary step."""

import copy
import gc
import itertools
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from own_parts import MatrixNorm
from stepping import events_of, frugal, matrices, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from adafrugal.optim import Frugal, LinearDecay, LossAware, UpdateInBackward
from adafrugal.optim.choices import POLICIES, SUBSPACES


class Model(nn.Module):
    """Embeddings that are the head as well, matrices of two shapes, one that is used twice, one that never is."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.twice, self.never = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = self.twice(torch.tanh(self.twice(hidden)))
        hidden = hidden + self.down(torch.tanh(self.up(hidden)))
        return nn.functional.cross_entropy(hidden @ self.embedding.weight.T, tokens.roll(1))

    def groups(self):
        split = [self.up.weight, self.down.weight, self.twice.weight, self.never.weight]
        others = [p for p in self.parameters() if all(p is not q for q in split)]
        return [{"params": split, "split": True}, {"params": others}]


def trained(make, in_backward, dtype):
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer, events = make(model), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if isinstance(optimizer, Frugal):
        optimizer.register_refresh_hook(lambda change: events.append((change.event, change.step, change.bytes_after)))
    if in_backward:
        UpdateInBackward(optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(13):
        model(torch.randint(50, (30,), generator=generator)).backward()
        assert not in_backward or all(param.grad is None for param in model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if isinstance(optimizer, Frugal) and step % 5 == 4:
            optimizer.observe(2.0)
    return model, optimizer, events


def alike(make, dtype=torch.float32):
    """Check that weights, state and events with and without are the same to the bit; return the events."""
    (model, optimizer, events), (other, its, others) = (trained(make, on, dtype) for on in (False, True))
    assert events == others
    assert same(model.parameters(), other.parameters())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[ours].keys() == its.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            found = its.state[theirs][key]
            assert torch.equal(value, found) if torch.is_tensor(value) else value == found, key
    return events


@pytest.mark.parametrize(("kind", "on_refresh"), [(k, p) for k in SUBSPACES for p in POLICIES[k]])
def test_every_subspace_through_refreshes_with_both_controls(kind, on_refresh):
    moving = {"density": LinearDecay(0.6, 0.2, steps=12), "interval": LossAware(2, 6)}
    events = alike(lambda model: Frugal(model.groups(), subspace=kind, on_refresh=on_refresh, **moving))
    assert [event for event, *_ in events].count("refresh") >= 3


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"fused": False, "compile": False}, torch.float32),
        ({"state_full": "lion", "state_free": "sgd"}, torch.float32),
        ({"state_full": "sgdm", "state_free": "none"}, torch.float32),
        ({"state_dtype": "bfloat16", "stochastic_rounding": True}, torch.float32),
        ({"stochastic_rounding": True}, torch.bfloat16),
        ({"subspace": "columns", "stagger": 2, "interval": 3}, torch.float32),
        ({"density": 0}, torch.float32),
        ({"state_free": MatrixNorm(), "subspace": "slab"}, torch.float32),
        ({"state_free": "whiten"}, torch.float32),
        ({"state_free": "swan", "subspace": "columns", "stochastic_rounding": True}, torch.bfloat16),
        ({"state_free": "sinkhorn", "subspace": "svd"}, torch.float32),
    ],
    ids=str,
)
def test_every_other_setting(settings, dtype):
    alike(lambda model: Frugal(model.groups(), weight_decay=0.1, **{"interval": 4} | settings), dtype)


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), torch.optim.Adafactor])
def test_torchs_own_optimizers(make):
    alike(lambda model: make(model.parameters(), lr=0.01))


def test_gradients_are_never_all_there():
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    there = []
    for param in layers.parameters():  # before the update's hook, so that it sees the gradient
        param.register_post_accumulate_grad_hook(lambda _: there.append([p.grad for p in layers.parameters()]))
    optimizer = frugal(list(layers.parameters()))  # held by its name
    UpdateInBackward(optimizer)
    layers(torch.randn(4, 16)).sum().backward()
    assert [sum(grad is not None for grad in grads) for grads in there] == [1] * 6


def test_a_second_backward_pass_is_refused_and_a_step_makes_room():
    model = Model()
    optimizer = Frugal(model.groups())
    UpdateInBackward(optimizer)
    tokens = torch.arange(30)
    model(tokens).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="a second backward pass in one step"):
        model(tokens).backward()
    optimizer.step()
    assert same(model.state_dict().values(), before.values())
    model(tokens).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_that_share_a_weight_must_not_be_reentrant(use_reentrant):
    shared = nn.Linear(6, 6, bias=False)
    UpdateInBackward(optimizer := frugal(list(shared.parameters()), density=1.0))
    hidden = torch.ones(2, 6, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(shared, hidden, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="use_reentrant=False") if use_reentrant else nullcontext():
        hidden.sum().backward()
        optimizer.step()


def test_what_looks_at_all_gradients_is_refused():
    with pytest.raises(ValueError, match="nonfinite is 'skip', which looks at all gradients"):
        UpdateInBackward(Frugal(Model().groups(), nonfinite="skip"))


def test_torchs_optimizers_refuse_a_gradient_of_another_tensor():
    first, second, later = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = torch.optim.AdamW([first, second])
    UpdateInBackward(optimizer)
    optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="another tensor has a gradient, too"):
        (first + second).sum().backward()
    assert torch.equal(later, torch.ones(3))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("subspace", ["columns", "svd"])
def test_frugal_leaves_a_tensor_without_a_hook_to_its_step(subspace, order):
    ends = []
    for in_backward in (False, True):
        params = matrices([(12, 12)] * 3)
        params[2].requires_grad_(False)
        optimizer = frugal(params, subspace=subspace, interval=2, density=0.25, compile=False)
        if in_backward:
            UpdateInBackward(optimizer)
        params[2].requires_grad_(True)  # it comes later
        for step in range(5):
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
            for place in order:  # gradients come in the reverse of this order
                x = x @ params[place]
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(optimizer.state[p]["entries"] for p in params)
        ends.append(params)
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:no group says split")
def test_parameters_may_change_their_places_between_steps():
    first, second, third = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
    optimizer = Frugal([{"params": [first, second], "split": False}, {"params": [third], "split": False}], lr=0.5)
    UpdateInBackward(optimizer)
    (first + second + third).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"].reverse()
    (first + second + third).sum().backward()
    optimizer.step()
    assert [p[0].item() for p in (first, second, third)] == pytest.approx([0.0, 1.0, 2.0], abs=1e-4)
    del optimizer.param_groups[0]["params"][0]
    (first + second).sum().backward()
    assert first[0].item() == pytest.approx(-0.5, abs=1e-4)
    assert first.grad is None
    assert second[0].item() == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(second.grad, torch.ones(3)), "no group has it any more"


def test_after_a_failed_step_a_loaded_state_goes_on():
    params = matrices([(8, 8)] * 2)
    optimizer = frugal(params, subspace="columns")
    UpdateInBackward(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    handle = params[0].register_post_accumulate_grad_hook(raising)
    with pytest.raises(KeyboardInterrupt):
        (params[0] @ params[1]).sum().backward()
    handle.remove()
    optimizer.zero_grad()
    optimizer.load_state_dict(saved)
    (params[0] @ params[1]).sum().backward()
    optimizer.step()


def raising(_):
    raise KeyboardInterrupt


def test_a_sparse_gradient_is_refused_in_frugals_own_words():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = frugal([embedding.weight])  # held by its name
    UpdateInBackward(optimizer)
    with pytest.raises(ValueError, match="Frugal takes no sparse gradients"):
        embedding(torch.arange(3)).sum().backward()


def test_what_is_frozen_stays_so():
    frozen, param = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([frozen, param], lr=1.0)  # held by its name
    UpdateInBackward(optimizer)
    (frozen * param).sum().backward()
    assert (frozen.tolist(), param.tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("is_frugal", [True, False])
def test_model_and_optimizer_go_when_nobody_holds_them(is_frugal):
    model = Model()
    optimizer = Frugal(model.groups()) if is_frugal else torch.optim.AdamW(model.parameters())
    UpdateInBackward(optimizer)
    model(torch.arange(30)).backward()
    optimizer.step()
    left = [weakref.ref(optimizer), weakref.ref(model.up.weight)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in left] == [None, None]


def test_a_model_whose_optimizer_is_gone_keeps_its_gradients():
    model = Model()
    UpdateInBackward(Frugal(model.groups()))
    gc.collect()
    before = model.up.weight.detach().clone()
    model(torch.arange(30)).backward()
    assert model.up.weight.grad is not None
    assert torch.equal(model.up.weight, before)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
@pytest.mark.parametrize("stagger", [1, 2])
def test_a_gradient_that_comes_late_changes_no_bit(late, on_refresh, stagger):
    """svd chooses by the gradient; meanwhile ρ falls, and what is not chosen yet must not hold that up."""
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        params = matrices([(16, 16)] * 2)
        how = {"subspace": "svd", "density": LinearDecay(0.8, 0.1, steps=6), "interval": 4}
        optimizer = frugal(params, stagger=stagger, on_refresh=on_refresh, **how)
        events = events_of(optimizer)
        if in_backward:
            UpdateInBackward(optimizer)
        for step in range(9):
            used = params if step >= 2 else [params[1 - late]]
            sum((param * torch.randn(16, 16)).sum() for param in used).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((events, params))
    (events, weights), (others, its) = found
    assert events == others
    assert ("continued", 3) in events
    assert same(weights, its)


def test_removed_it_leaves_gradients_to_the_step():
    model = Model()
    in_backward = UpdateInBackward(Frugal(model.groups()))
    in_backward.remove()
    before = copy.deepcopy(model.state_dict())
    model(torch.arange(30)).backward()
    assert model.up.weight.grad is not None
    assert same(model.state_dict().values(), before.values())
