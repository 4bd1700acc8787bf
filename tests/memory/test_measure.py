import pytest
import torch

from adafrugal.memory import measure


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
