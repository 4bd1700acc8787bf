import torch

from adafrugal.optim import rules


def test_adamw_equals_torch_bit_for_bit():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(w.clone()) for w in [torch.randn(7, 5)] * 2)
    reference = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    m, v = torch.zeros(7, 5), torch.zeros(7, 5)
    for step in range(1, 51):
        grad = torch.randn(7, 5)
        theirs.grad = grad.clone()
        reference.step()
        with torch.no_grad():
            rules.decay_(ours, lr=3e-3, weight_decay=0.1)
            rules.adamw_(ours, grad, m, v, step=step, lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    assert torch.equal(ours, theirs)


def test_signsgd_moves_every_entry_by_the_rate_against_the_sign():
    param = torch.tensor([1.0, 1.0, 1.0])
    rules.signsgd_(param, torch.tensor([1e-9, -5.0, 0.0]), lr=0.25)
    assert param.tolist() == [0.75, 1.25, 1.0]


def test_decay_shrinks_by_the_rate_times_lambda():
    param = torch.tensor([2.0, -4.0])
    rules.decay_(param, lr=0.1, weight_decay=0.5)
    assert torch.equal(param, torch.tensor([2.0, -4.0]) * (1 - 0.1 * 0.5))
