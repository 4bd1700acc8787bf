import math

import pytest
import torch
from stepping import frugal

from adafrugal.optim import rules
from adafrugal.optim.kernels import lists
from adafrugal.optim.rules import Rates


def test_steps_of_their_own_give_each_entry_its_own_bias_correction():
    torch.manual_seed(1)
    steps, rates = torch.tensor([[1.0, 2.0, 50.0]]), Rates(lr=0.1, betas=(0.8, 0.95))
    start, grad, m, v = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    together = [t.clone() for t in (start, m, v)]
    rules.adamw_(together[0], grad, *together[1:], step=steps, rates=rates)
    for column, step in enumerate(steps[0].tolist()):
        alone = [t[:, column].clone() for t in (start, m, v)]
        rules.adamw_(alone[0], grad[:, column], *alone[1:], step=step, rates=rates)
        torch.testing.assert_close(together[0][:, column], alone[0])


def test_sgdm_equals_torch_bit_for_bit():
    torch.manual_seed(2)
    ours, theirs = (torch.nn.Parameter(w.clone()) for w in [torch.randn(7, 5)] * 2)
    reference, buffer = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, foreach=False), torch.zeros(7, 5)
    for step in range(1, 21):
        theirs.grad = torch.randn(7, 5)
        reference.step()
        with torch.no_grad():
            rules.sgdm_(ours, theirs.grad, buffer, step=step, rates=Rates(lr=0.1, betas=(0.8, 0.0)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("density", "rule"), [*((1.0, rule) for rule in rules.STATE_FULL), (0, "signsgd"), (0, "sgd")])
def test_a_gradient_that_is_no_number_makes_the_weight_one_too(rule, density, fused):
    param = torch.nn.Parameter(torch.zeros(3, 40))
    rule = {"state_full" if density else "state_free": rule}
    optimizer = frugal([param], density=density, fused=fused, compile=False, **rule)
    param.grad = torch.ones_like(param)
    param.grad[1, 30] = math.nan
    optimizer.step()
    assert param.isnan().nonzero().tolist() == [[1, 30]]


def test_signs_of_many_tensors_are_those_of_each():
    values = [torch.tensor([math.nan, -math.inf, -2.0, -0.0, 0.0, 1e-45, 3.0] * n) for n in (1, 30)]
    for value, of_many in zip(values, lists._signs(values), strict=True):
        torch.testing.assert_close(of_many, rules.sign(value), rtol=0, atol=0, equal_nan=True)
        assert of_many.tolist()[1:7] == [-1, -1, 0, 0, 1, 1]
