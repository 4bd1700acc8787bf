import torch

from adafrugal.optim import rounding
from adafrugal.optim.rounding import Rounding, noise, noise_key


def stored(value, stochastic=True, n=20_000, step=1, number=0, first=0, role=0, dtype=torch.bfloat16):
    target = torch.zeros(n, dtype=dtype)
    Rounding(stochastic, noise_key(0, step), number, (first, first)).store(target, torch.full((n,), value), role)
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


def test_each_step_tensor_and_role_draws_its_own_and_each_part_what_the_whole_does():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), stored(0.1)
    assert torch.equal(torch.get_rng_state(), before)
    for other in ({"step": 2}, {"number": 1}, {"role": 1}, {"role": 2}):
        assert (stored(0.1, **other) == first).float().mean() < 0.9
    assert torch.equal(stored(0.1, first=8, n=100), first[8:108])
    whole = Rounding(True, 5, 3)
    parts = [torch.zeros(50, dtype=torch.bfloat16) for _ in range(2)]
    for i, part in enumerate(parts):
        whole.after(50 * i).store(part, torch.full((50,), 0.1), 0)
    once = torch.zeros(100, dtype=torch.bfloat16)
    whole.store(once, torch.full((100,), 0.1), 0)
    assert torch.equal(torch.cat(parts), once)


def test_noise_is_uniform_and_independent_of_its_neighbours():
    like = torch.zeros(2**18)
    for first in (0, 2**32 - 2**17):
        drawn = noise(noise_key(0, 1), 0, 0, first, like).double()
        next_tensor, next_step = noise(noise_key(0, 1), 1, 0, first, like), noise(noise_key(0, 2), 0, 0, first, like)
        counts = torch.bincount((drawn / 256).long(), minlength=256).double()
        chi_square = ((counts - 1024) ** 2 / 1024).sum()
        assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # mean and deviation of 255 degrees of freedom
        pairs = (drawn[1:], drawn[:-1]), (drawn, next_tensor.double()), (drawn, next_step.double())
        assert all(abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 5 / 2**9 for pair in pairs)


def test_noise_is_the_hash_of_each_entry():
    for first in (0, 2**31 - 2, 2**32 - 3, 2**40 + 2**32 - 1):
        start = rounding._mixed(rounding._mixed(12345 + 7) + 2)
        expected = [
            rounding._mixed(rounding._mixed(start + (entry >> 32)) ^ (entry & 0xFFFFFFFF)) >> 16
            for entry in range(first, first + 6)
        ]
        assert noise(12345, 7, 2, first, torch.zeros(2, 3)).flatten().tolist() == expected
