from pathlib import Path

import pytest
import stand_in
import torch

from adafrugal.settings.schema import TrainerSettings
from adafrugal.system.errors import SettingError
from adafrugal.training.devices import open_device


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert open_device(TrainerSettings(device="cpu")).precision == "fp32"
    with open_device(TrainerSettings(device="cpu", precision="bf16")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cpuinfo", "is_slow"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f", True), ("flags\t\t: fpu avx512f avx512_bf16", False),
        ("flags : amx_bf16 amx_tile", False), ("Features : asimd bf16", False), ("Features : fp asimd", True),
        ("isa : rv64imafdc", False), (None, False),
    ],
)  # fmt: skip
def test_a_cpu_without_instructions_for_bf16_is_said_to_be_slow_in_it(cpuinfo, is_slow, monkeypatch):
    def read(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    said = []
    for precision in ("fp32", "auto", "bf16"):
        open_device(TrainerSettings(device="cpu", precision=precision), warn=said.append)
    assert len(said) == is_slow
    assert not is_slow or "no instructions for bf16" in said[0]


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


NO_KERNEL, FULL, BUSY = (
    "CUDA error: no kernel image",
    "CUDA out of memory",
    "CUDA error: devices are busy or unavailable",
)


@pytest.mark.parametrize(("text", "size"), [(NO_KERNEL, 1), (NO_KERNEL, 2), (FULL, 1), (BUSY, 1)])
def test_a_gpu_that_fails_is_replaced_by_the_cpu_only_where_one_process_could_not_use_it_ever(monkeypatch, text, size):
    """A busy one is no reason for days on a CPU, and one of several processes does not go there alone."""
    said = []
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch, "ones", lambda *_, **__: refuses(text)())
        if (text, size) == (NO_KERNEL, 1):
            assert open_device(TrainerSettings(), warn=said.append).device.type == "cpu"
            assert f"cannot use NVIDIA H100 80GB HBM3 ({NO_KERNEL})" in said[0]
        else:
            with pytest.raises(SettingError, match=r"cannot be used now .*CUDA_VISIBLE_DEVICES"):
                open_device(TrainerSettings(), warn=said.append)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    with stand_in.installed(monkeypatch), pytest.raises(SettingError, match="LOCAL_RANK is 1, and torch finds GPUs 0"):
        open_device(TrainerSettings(), number=1)


@pytest.mark.gpu
def test_a_gpu_is_taken_where_there_is_one_with_bf16_where_it_has_it():
    found = open_device(TrainerSettings())
    assert found.device.type == "cuda"
    assert found.precision == ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")


def test_a_run_is_held_to_a_part_of_the_gpu_and_the_next_one_is_not(monkeypatch):
    """The context is part of it: of 15 GiB torch's allocator may hold 14.14."""
    with stand_in.installed(monkeypatch) as gpu:
        there = torch.cuda.get_device_properties(0).total_memory
        place = open_device(TrainerSettings(memory_limit_gib=15))
        assert gpu.share == pytest.approx(14.14 * 2**30 / there, rel=1e-6)
        assert place.memory() == 15 * 2**30 < there
        assert place.free() <= 14.14 * 2**30
        assert open_device(TrainerSettings(memory_limit_gib=10_000)).memory() == there
        assert open_device(TrainerSettings()).memory() == there
        assert gpu.share == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_is_not_held_to_the_memory_of_a_gpu():
    with pytest.raises(SettingError, match=r"memory_limit_gib is 15, which holds .* on a CPU; allowed here: null"):
        open_device(TrainerSettings(memory_limit_gib=15))


@pytest.mark.gpu
def test_a_gpu_refuses_what_is_above_the_limit():
    open_device(TrainerSettings(memory_limit_gib=2))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**31, dtype=torch.uint8, device="cuda")
    open_device(TrainerSettings())
    assert torch.empty(2**31, dtype=torch.uint8, device="cuda").is_cuda
