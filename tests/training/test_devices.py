import pytest
import torch

from adafrugal.config import SettingError, TrainerSettings
from adafrugal.training.devices import place


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert place(TrainerSettings(device="cpu")).precision == "fp32"
    with place(TrainerSettings(device="cpu", precision="bf16")).autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(SettingError, match=r"trainer.device is cuda, but torch finds no GPU; allowed here: auto, cpu"):
        place(TrainerSettings(device="cuda"))


@pytest.mark.gpu
def test_a_gpu_is_taken_where_there_is_one_with_bf16_where_it_has_it():
    found = place(TrainerSettings())
    assert found.device.type == "cuda"
    assert found.precision == ("bf16" if torch.cuda.is_bf16_supported() else "fp32")
