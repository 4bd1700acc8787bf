import pytest
import torch

from adafrugal.memory import measure
from adafrugal.optim import state_bytes


def test_a_cpu_tells_what_the_process_holds():
    before = measure.read(torch.device("cpu"))
    kept = torch.ones(64 * 2**20 // 4)  # 64 MiB, touched
    after = measure.read(torch.device("cpu"))
    assert after["resident"] - before["resident"] > 60 * 2**20
    assert after["peak_resident"] >= after["resident"] - 2**20
    assert measure.peak(after) == after["peak_resident"]
    del kept


@pytest.mark.gpu
def test_a_gpu_tells_the_peak_of_each_window():
    device = torch.device("cuda")
    measure.read(device)
    tensor = torch.ones(64 * 2**20 // 4, device=device)
    del tensor
    assert measure.read(device)["peak"] >= 64 * 2**20
    assert measure.read(device)["peak"] < 64 * 2**20


def test_adamws_state_is_what_adamw_keeps():
    model = torch.nn.Linear(7, 5)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    assert measure.adamw_state_bytes([*model.parameters(), frozen]) == state_bytes(optimizer).total
