from pathlib import Path

import pytest
import stand_in
import torch

from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import SettingError
from adafrugal.training import devices
from adafrugal.training.devices import open_device


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert open_device(TrainerSettings(device="cpu")).precision == "fp32"
    with open_device(TrainerSettings(device="cpu", precision="bf16")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == torch.bfloat16


def test_a_run_goes_on_in_the_precision_that_it_began_in_unless_told_otherwise():
    here = open_device(TrainerSettings(device="cpu"))
    assert here.begun_in("bf16", "auto").precision == "bf16"
    assert here.begun_in("bf16", "fp32").precision == "fp32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(SettingError, match=r"trainer.device is cuda, but torch finds no GPU; allowed here: auto, cpu"):
        open_device(TrainerSettings(device="cuda"))


@pytest.fixture
def unusable(monkeypatch):
    """The machine has an NVIDIA GPU, and torch says that there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def refuses(text):
    def init():
        raise RuntimeError(text)

    return init


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_gpu_that_torch_cannot_use_is_a_warning_that_says_why(unusable, monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", refuses("The NVIDIA driver on your system is too old\nand more"))
    reason = "is a build without CUDA" if cuda is None else "The NVIDIA driver on your system is too old"
    said = []
    assert open_device(TrainerSettings(), warn=said.append).device.type == "cpu"
    (line,) = said
    assert line.startswith("the run is made on the CPU: this machine has an NVIDIA GPU")
    assert reason in line
    assert "\n" not in line
    with pytest.raises(SettingError, match=f"trainer.device is cuda, but this machine has an NVIDIA GPU.*{reason}"):
        open_device(TrainerSettings(device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert open_device(TrainerSettings(), warn=said.append).device.type == "cpu"
    assert open_device(TrainerSettings(device="cpu"), warn=said.append).device.type == "cpu"
    assert len(said) == 1


def test_a_gpu_without_kernels_in_this_build_is_not_used(monkeypatch):
    said = []
    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch, "ones", lambda *_, **__: refuses("CUDA error: no kernel image is available")())
        assert open_device(TrainerSettings(), warn=said.append).device.type == "cpu"
    assert "cannot use NVIDIA H100 80GB HBM3 (CUDA error: no kernel image is available)" in said[0]


@pytest.mark.parametrize("text", ["CUDA out of memory", "CUDA error: all CUDA-capable devices are busy or unavailable"])
def test_a_gpu_that_is_busy_is_no_reason_for_days_on_a_cpu(monkeypatch, text):
    line = r"cannot be used now .*CUDA_VISIBLE_DEVICES"
    with stand_in.installed(monkeypatch), pytest.raises(SettingError, match=line):
        monkeypatch.setattr(torch, "ones", lambda *_, **__: refuses(text)())
        open_device(TrainerSettings())


def test_one_of_several_processes_does_not_go_to_the_cpu_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stand_in.installed(monkeypatch), pytest.raises(SettingError, match="cannot be used now"):
        monkeypatch.setattr(torch, "ones", lambda *_, **__: refuses("CUDA error: no kernel image is available")())
        open_device(TrainerSettings())


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    with stand_in.installed(monkeypatch), pytest.raises(SettingError, match="LOCAL_RANK is 1, and torch finds GPUs 0"):
        devices.open_device(TrainerSettings(), number=1)


@pytest.mark.gpu
def test_a_gpu_is_taken_where_there_is_one_with_bf16_where_it_has_it():
    found = open_device(TrainerSettings())
    assert found.device.type == "cuda"
    assert found.precision == ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")
