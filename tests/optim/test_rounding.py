import torch

from adafrugal.optim.rounding import Rounding


def stored(value, stochastic=True, n=20_000, step=1, first_row=0, dtype=torch.bfloat16):
    target = torch.zeros(n, dtype=dtype)
    Rounding(stochastic, 0, step, 0, first_row).store(target, torch.full((n,), value))
    return target


def test_the_mean_is_right_and_only_the_two_neighbours_occur():
    for value in (1.0 + 2**-10, -3.14159, 1e-20, 0.1):
        found = stored(value)
        nearest = torch.tensor(value).bfloat16()
        assert len(found.unique()) == 2
        assert (found.unique() - nearest).abs().max() <= 2**-7 * abs(value)
        assert abs(found.double().mean() / value - 1) < 2e-4


def test_what_bfloat16_can_say_is_left_alone():
    for value in (0.0, 1.5, -(2.0**-30), float("inf"), float("-inf")):
        assert torch.equal(stored(value, n=100), torch.full((100,), value).bfloat16())
    assert stored(float("nan"), n=100).isnan().all()


def test_to_the_nearest_when_not_asked_for_and_in_other_types():
    value = 1.0 + 2**-10
    assert torch.equal(stored(value, stochastic=False), torch.ones(20_000).bfloat16())
    assert torch.equal(stored(value, dtype=torch.float32), torch.full((20_000,), value))


def test_draws_follow_seed_step_and_rows_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stored(0.1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(stored(0.1), first)
    assert not torch.equal(stored(0.1, step=2), first)
    assert not torch.equal(stored(0.1, first_row=8), first)
    assert torch.equal(stored(0.1, first_row=8), stored(0.1, first_row=8)), "as replicas of the same rows do"
