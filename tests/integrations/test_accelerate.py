import pytest
import torch
import torch.distributed as dist
from small import adafrugal, llama, rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from adafrugal.integrations.watch import find_frugal
from adafrugal.optim import Frugal, split_parameters

pytest.importorskip("accelerate", reason="accelerate is an extra: make extras")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters


@pytest.fixture(autouse=True)
def afresh():
    """accelerate keeps its state in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(accumulation=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = llama()
    optimizer = Frugal(split_parameters(model), **adafrugal())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(rows(24), 2), schedule)


def train(accelerator, model, optimizer, loader, schedule, batches):
    for number, batch in enumerate(loader):
        if number in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and find_frugal(optimizer).param_groups[0]["steps"] % 2 == 0:
                find_frugal(optimizer).observe(5.0)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_preparing_leaves_an_unstepped_optimizer_without_state():
    _, _, optimizer, _, _ = prepared()
    assert isinstance(optimizer, AcceleratedOptimizer)
    found = find_frugal(optimizer)
    assert found.state_bytes().total == 0
    assert (found.density, found.param_groups[0]["steps"]) == (0.0, 0)


@pytest.mark.parametrize("processes", [1, 4])
def test_density_follows_optimizer_steps_not_batches_or_the_schedule(processes, monkeypatch):
    """accelerate steps a schedule once for each process."""
    accelerator, model, optimizer, loader, schedule = prepared(accumulation=3)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", processes)
    train(accelerator, model, optimizer, loader, schedule, range(12))
    found = find_frugal(optimizer)
    assert schedule.scheduler.last_epoch == 4 * processes
    assert found.param_groups[0]["steps"] == 4
    assert found.density == pytest.approx(0.6 - 0.5 * 4 / 8)
    assert found.interval == 3


def test_a_saved_state_continues_bit_for_bit(tmp_path):
    whole = prepared()
    train(*whole, range(3))
    whole[0].save_state(str(tmp_path))
    other = prepared()
    other[0].load_state(str(tmp_path))
    for each in (whole, other):
        train(*each, range(3, 9))
    a, b = (find_frugal(each[2]) for each in (whole, other))
    assert other[2].param_groups is b.param_groups, "the groups that the schedule sets are those that are used"
    assert same(whole[1], other[1])
    assert (a.checksum(), a.interval, a.density) == (b.checksum(), b.interval, b.density)
    assert (a.interval, a.density) == (27, pytest.approx(0.1))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(optimizer, model):
    """What `Accelerator.prepare` does under FSDP 2, which it refuses on a CPU: exchange parameters, then wrap."""
    names = {param: name for name, param in model.named_parameters()}
    places = {param.data_ptr(): name for param, name in names.items()}
    for params in (held["params"] for held in optimizer.param_groups):
        for i, param in enumerate(params):
            params[i] = torch.empty(1)
            params[i].data_ptr = param.data_ptr()
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    now = dict(model.named_parameters())
    fsdp2_switch_optimizer_parameters(optimizer, {place: now[name] for place, name in places.items()})
    Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer)


@pytest.mark.parametrize("subspace", ["blocks", "columns", "slab"])
def test_parameters_that_fsdp_exchanges_are_trained(group, subspace):
    found = []
    for shard in (False, True):
        model = llama()
        optimizer = Frugal(split_parameters(model), **adafrugal(subspace=subspace))
        optimizer = sharded(optimizer, model) if shard else optimizer
        for row in rows(4):
            model(**{key: value[None] for key, value in row.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_subspace_that_needs_whole_matrices_is_refused_once_they_are_exchanged(group):
    model = llama()
    optimizer = Frugal(split_parameters(model), **adafrugal(subspace="randk"))
    with pytest.raises(ValueError, match=r"is sharded over processes and the subspace is .*randk"):
        sharded(optimizer, model)
