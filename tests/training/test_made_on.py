"""The model is made where it trains."""

import pytest
import stand_in
import torch
from tiny import TINY

from adafrugal.models import llama
from adafrugal.settings.schema import TrainerSettings
from adafrugal.training.distributed import parallel

CPU = torch.device("cpu")
LAST = [0.007856949232518673, 0.0035559721291065216, 0.0033465949818491936, -0.021494608372449875]  # of seed 3


def made(device, settings, seed=3):
    torch.manual_seed(seed)
    with parallel.made_on(device, settings):
        return llama.build(TINY)


def states_are_equal(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value.cpu(), theirs[name].cpu()) for name, value in one.state_dict().items())


def test_on_a_cpu_a_seed_gives_the_weights_that_it_always_gave():
    torch.manual_seed(3)
    expected = llama.build(TINY)
    found = made(CPU, TrainerSettings())
    assert states_are_equal(found, expected)
    torch.testing.assert_close(found.lm_head.weight[-1, :4].detach(), torch.tensor(LAST), rtol=1e-6, atol=0)


def test_every_tensor_is_made_on_the_device():
    model = made(torch.device("meta"), TrainerSettings())
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_what_will_be_sharded_is_made_on_the_cpu_of_what_the_devices_generator_draws(monkeypatch):
    """Tensor by tensor: the generator goes through the same draws as where the whole is made on the device."""
    sizes = []
    empty_like = torch.empty_like

    def counts(tensor, **more):
        sizes.append((tensor.numel(), more.get("device")))
        return empty_like(tensor, **more)

    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch, "empty_like", counts)
        model = made(torch.device("cuda", 0), TrainerSettings(parallel="fsdp"))
    assert states_are_equal(model, made(CPU, TrainerSettings()))
    assert {device for _, device in sizes} == {torch.device("cuda", 0)}
    assert max(size for size, _ in sizes) == 300 * 32  # never more than a tensor on the device


@pytest.mark.gpu
def test_on_a_gpu_a_seed_gives_the_same_weights_in_every_way():
    device = torch.device("cuda")
    one, other = (made(device, TrainerSettings()) for _ in range(2))
    assert states_are_equal(one, other)
    assert states_are_equal(one, made(device, TrainerSettings(parallel="fsdp")))
    assert not states_are_equal(one, made(CPU, TrainerSettings()))
