import torch

from adafrugal.optim import Frugal, state_bytes


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def matrices():
    return [("a", torch.nn.Parameter(torch.zeros(4, 8))), ("b", torch.nn.Parameter(torch.zeros(2, 8)))]


def test_frugal_by_parameter_and_role():
    optimizer = stepped(Frugal([{"params": matrices(), "split": True}], density=0.5, subspace="columns"))
    counted = optimizer.state_bytes()
    assert counted["a"] == {"counters": 4, "moments": 2 * 4 * (4 * 4), "indices": 8 * 4}
    assert counted["b"] == {"counters": 4, "moments": 2 * 4 * (2 * 4), "indices": 8 * 4}
    assert counted.by_role() == {"counters": 8, "moments": 192, "indices": 64}
    assert counted.total == 264


def test_torchs_own_optimizers_with_and_without_names():
    adamw = stepped(torch.optim.AdamW([{"params": matrices()}]))
    assert state_bytes(adamw).by_role() == {"counters": 8, "moments": 2 * 4 * 48}
    sgd = stepped(torch.optim.SGD([p for _, p in matrices()], lr=1.0, momentum=0.9))
    assert state_bytes(sgd) == {"0": {"moments": 128}, "1": {"moments": 64}}
    assert state_bytes(torch.optim.SGD([p for _, p in matrices()], lr=1.0)).total == 0


def test_no_group_hides_another():
    sgd = torch.optim.SGD([{"params": [p]} for _, p in matrices()], lr=1.0, momentum=0.9)
    assert state_bytes(stepped(sgd)) == {"0": {"moments": 128}, "1": {"moments": 64}}
    same_names = [{"params": [("a", p)]} for _, p in matrices()]
    assert state_bytes(stepped(torch.optim.SGD(same_names, lr=1.0, momentum=0.9))).total == 192
