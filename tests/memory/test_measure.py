import mmap

import pytest
import torch

from adafrugal.memory import measure
from adafrugal.settings.schema import TrainerSettings
from adafrugal.training.devices import open_device


def test_a_cpu_tells_what_the_process_holds():
    before = measure.read(torch.device("cpu"))
    kept = mmap.mmap(-1, 64 * 2**20)  # from the system itself, since an allocator may have memory left
    kept.write(b"1" * len(kept))
    after = measure.read(torch.device("cpu"))
    assert after["resident"] - before["resident"] > 60 * 2**20
    assert after["peak_resident"] >= after["resident"] - 2**20
    assert measure.peak(after) == after["peak_resident"]
    kept.close()


def test_a_peak_is_of_what_has_been_since_the_run_began():
    kept = mmap.mmap(-1, 200 * 2**20)
    kept.write(b"1" * len(kept))
    kept.close()
    before = measure.begin(torch.device("cpu"))
    assert 0 <= measure.read(torch.device("cpu"))["peak_resident"] - before < 100 * 2**20


@pytest.mark.gpu
def test_a_gpu_tells_the_peak_of_each_window():
    device = open_device(TrainerSettings(device="cuda")).device
    held = measure.read(device)["allocated"]  # by tests before this one
    tensor = torch.ones(64 * 2**20 // 4, device=device)
    del tensor
    assert measure.read(device)["peak"] >= held + 64 * 2**20
    assert measure.read(device)["peak"] < held + 64 * 2**20
