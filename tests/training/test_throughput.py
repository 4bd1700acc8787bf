"""Model FLOPs against a card's peak."""

import pytest
import stand_in
import torch

from adafrugal.config import LlamaSettings
from adafrugal.models import llama
from adafrugal.training import throughput
from adafrugal.training.devices import Place


def test_six_flops_for_each_parameter_that_a_token_is_multiplied_with():
    shape = LlamaSettings(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocabulary_size=32_000
    )
    with torch.device("meta"):
        model = llama.build(shape)
    assert throughput.flops_per_token(model) == 6 * (58_073_600 - 32_000 * 512)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp16", 989e12), ("fp32", 494.5e12)])
def test_the_peak_is_the_datasheets(monkeypatch, precision, peak):
    with stand_in.installed(monkeypatch):
        assert throughput.peak_flops(Place(torch.device("cuda", 0), precision)) == peak


def test_a_card_that_is_not_known_and_a_cpu_have_none(monkeypatch):
    assert throughput.peak_flops(Place(torch.device("cpu"), "bf16")) is None
    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of tomorrow")
        assert throughput.peak_flops(Place(torch.device("cuda", 0), "bf16")) is None


def test_a_small_batch_is_named_where_the_gpu_is_idle():
    assert throughput.idle(0.03, 4096).startswith("the GPU reaches 3% of its peak: 4,096 tokens in a micro-batch")
    assert throughput.idle(0.3, 4096) is None
    assert throughput.idle(0.03, 32_768) is None  # something else is slow
