"""Model FLOPs against a card's peak."""

import pytest
import stand_in
import torch

from adafrugal.models import llama
from adafrugal.settings import compose
from adafrugal.settings.schema import LlamaSettings
from adafrugal.tracking import cards
from adafrugal.training import throughput
from adafrugal.training.devices import Place


def test_six_flops_for_each_parameter_that_a_token_is_multiplied_with():
    shape = LlamaSettings(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocabulary_size=32_000
    )
    with torch.device("meta"):
        model = llama.build(shape)
    assert throughput.flops_per_token(model) == 6 * (58_073_600 - 32_000 * 512)


@pytest.mark.parametrize(
    ("device", "card", "precision", "peak"),
    [
        ("cuda:0", "NVIDIA H100 80GB HBM3", "bf16", 989e12), ("cuda:0", "NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("cuda:0", "NVIDIA H100 80GB HBM3", "fp32", 494.5e12), ("cuda:0", "a card of tomorrow", "bf16", None),
        ("cpu", None, "bf16", None),
    ],
)  # fmt: skip
def test_the_peak_is_the_datasheets(monkeypatch, device, card, precision, peak):
    with stand_in.installed(monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
        assert throughput.peak_flops(Place(torch.device(device), precision)) == peak


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_whole_name(name, peak):
    assert cards.peak_flops(name) == peak


@pytest.mark.parametrize(
    ("batch", "processes", "tokens_per_second", "says"),
    [
        (16, 1, 63_000, "the GPU reaches 2% of its peak: 4,096 tokens in a micro-batch leave it idle"),
        (16, 2, 126_000, "the GPU reaches 2% of its peak: 2,048 tokens in a micro-batch leave it idle"),
        (16, 1, 1_160_000, None),
        (128, 1, 63_000, None),  # something else is slow
    ],
)
def test_a_small_batch_that_leaves_the_gpu_idle_is_named_once(monkeypatch, batch, processes, tokens_per_second, says):
    shape = ["model=llama_60m", f"trainer.batch_size={batch}", "trainer.sequence_length=256"]
    settings = compose.settings(shape)
    with torch.device("meta"):
        model = llama.build(settings.model)
    with stand_in.installed(monkeypatch):
        meter = throughput.Meter(settings, model, Place(torch.device("cuda", 0), "bf16"), processes)
    line = meter.mfu(tokens_per_second)
    assert line["mfu"] == pytest.approx(tokens_per_second * 6 * 41.69e6 / 989e12 / processes, rel=1e-3)
    first, second, third = (meter.idle(line) for _ in range(3))
    assert first is third is None
    assert second is None if says is None else second.startswith(says)


def test_on_a_cpu_there_is_no_such_part(settings):
    chosen, _ = settings()
    meter = throughput.Meter(chosen, torch.nn.Linear(1, 1), Place(torch.device("cpu"), "fp32"))
    assert meter.mfu(1000.0) == {}
    assert meter.idle({}) is meter.idle({}) is None
