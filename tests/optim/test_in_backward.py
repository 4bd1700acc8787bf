"""Updates within the backward pass, against the ordinary step."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from adafrugal.optim import Frugal, LinearDecay, LossAware, UpdateInBackward
from adafrugal.optim.subspaces import SUBSPACES


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

    def groups(self, **settings):
        split = [self.up.weight, self.down.weight, self.twice.weight, self.never.weight]
        others = [p for p in self.parameters() if all(p is not q for q in split)]
        return [{"params": split, "split": True, **settings}, {"params": others}]


def trained(make, in_backward, steps=13, dtype=torch.float32):
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer, events = make(model), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if isinstance(optimizer, Frugal):
        optimizer.register_refresh_hook(lambda change: events.append((change.event, change.step, change.bytes_after)))
    if in_backward:
        UpdateInBackward(optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        model(torch.randint(50, (30,), generator=generator)).backward()
        assert not in_backward or all(param.grad is None for param in model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if isinstance(optimizer, Frugal) and step % 5 == 4:
            optimizer.observe(2.0)
    return model, optimizer, events


def alike(make, **more):
    """Check that weights, state and events with and without are the same to the bit; return the events."""
    (model, optimizer, events), (other, its, same) = (trained(make, on, **more) for on in (False, True))
    assert events == same
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert optimizer.state[ours].keys() == its.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            equal = torch.equal if torch.is_tensor(value) else str.__eq__ if isinstance(value, str) else int.__eq__
            assert equal(value, its.state[theirs][key]), key
    return events


FALLING = {"density": LinearDecay(0.6, 0.2, steps=12), "interval": LossAware(2, 6, every=1)}


@pytest.mark.parametrize("kind", SUBSPACES)
@pytest.mark.parametrize("on_refresh", ["reset", "reset_all", "keep"])
def test_every_subspace_through_refreshes_with_both_controls(kind, on_refresh):
    if (kind, on_refresh) == ("blocks", "keep"):
        on_refresh = "keep_overlap"
    events = alike(lambda m: Frugal(m.groups(**copy.deepcopy(FALLING)), subspace=kind, on_refresh=on_refresh))
    assert [event for event, *_ in events].count("refresh") >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {"fused": False, "compile": False},
        {"compile": True},
        {"state_full": "lion", "state_free": "sgd"},
        {"state_full": "sgdm", "state_free": "none"},
        {"state_dtype": "bfloat16", "stochastic_rounding": True},
        {"subspace": "columns", "stagger": 2, "interval": 3},
        {"density": 0},
    ],
    ids=str,
)
def test_every_other_setting(settings):
    alike(lambda model: Frugal(model.groups(), weight_decay=0.1, **{"interval": 4} | settings))


def test_weights_in_bfloat16():
    alike(lambda model: Frugal(model.groups(), stochastic_rounding=True, interval=3), dtype=torch.bfloat16)


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), torch.optim.Adafactor])
def test_torchs_own_optimizers(make):
    alike(lambda model: make(model.parameters(), lr=0.01))


def test_gradients_are_never_all_there():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    optimizer = Frugal([{"params": list(layers.parameters()), "split": True}])
    there = []

    def count(_):
        there.append(sum(param.grad is not None for param in layers.parameters()))

    for param in layers.parameters():  # before the update's hook, so that it sees the gradient
        param.register_post_accumulate_grad_hook(count)
    UpdateInBackward(optimizer)
    layers(torch.randn(4, 16)).sum().backward()
    assert there == [1] * 6


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
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(tokens).backward()


def test_what_looks_at_all_gradients_is_refused():
    optimizer = Frugal(Model().groups(), nonfinite="skip")
    with pytest.raises(ValueError, match="nonfinite is 'skip', which looks at all gradients"):
        UpdateInBackward(optimizer)


@pytest.mark.parametrize("make", [lambda params: torch.optim.AdamW(params), lambda params: Frugal([*params])])
@pytest.mark.filterwarnings("ignore:no group says split")
def test_a_gradient_of_another_tensor_is_refused_and_not_used_twice(make):
    first, second, later = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = make([first, second])
    UpdateInBackward(optimizer)
    optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="another tensor has a gradient, too"):
        (first + second).sum().backward()
    assert torch.equal(later, torch.ones(3))


def test_a_sparse_gradient_is_refused_in_frugals_own_words():
    embedding = nn.Embedding(10, 4, sparse=True)
    UpdateInBackward(Frugal([{"params": [embedding.weight], "split": True}]))
    with pytest.raises(ValueError, match="Frugal takes no sparse gradients"):
        embedding(torch.arange(3)).sum().backward()


def test_what_is_frozen_stays_so():
    frozen, param = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    UpdateInBackward(torch.optim.SGD([frozen, param], lr=1.0))
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


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
@pytest.mark.parametrize("stagger", [1, 2])
def test_a_gradient_that_comes_late_changes_no_bit(late, on_refresh, stagger):
    """svd chooses by the gradient; meanwhile ρ falls, and what is not chosen yet must not hold that up."""
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(16, 16)) for _ in range(2)]
        optimizer, events = Frugal(
            [{"params": params, "split": True}], subspace="svd", density=LinearDecay(0.8, 0.1, steps=6), interval=4,
            stagger=stagger, on_refresh=on_refresh,
        ), []  # fmt: skip
        optimizer.register_refresh_hook(lambda c, events=events: events.append((c.event, c.step, c.density)))
        if in_backward:
            UpdateInBackward(optimizer)
        for step in range(9):
            used = params if step >= 2 else [params[1 - late]]
            sum((param * torch.randn(16, 16)).sum() for param in used).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((events, [p.detach() for p in params]))
    (events, weights), (others, same) = found
    assert events == others
    assert ("continued", 3) in [event[:2] for event in events]
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_removed_it_leaves_gradients_to_the_step():
    model = Model()
    in_backward = UpdateInBackward(Frugal(model.groups()))
    in_backward.remove()
    before = copy.deepcopy(model.state_dict())
    model(torch.arange(30)).backward()
    assert model.up.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
