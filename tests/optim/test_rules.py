import torch

from adafrugal.optim import rules
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
