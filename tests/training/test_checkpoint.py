from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from adafrugal.config import LlamaSettings
from adafrugal.models import llama
from adafrugal.training import checkpoint

TINY = LlamaSettings(
    vocabulary_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


def test_what_is_saved_comes_back_and_transformers_reads_it(tmp_path):
    torch.manual_seed(0)
    model, other = llama.build(TINY), llama.build(TINY)
    checkpoint.save(tmp_path, 7, [model], {"step": 7, "moments": torch.arange(3)}, keep=1)
    assert checkpoint.load_state(checkpoint.latest(tmp_path))["step"] == 7
    checkpoint.load_model(checkpoint.latest(tmp_path), other)
    again = LlamaForCausalLM.from_pretrained(checkpoint.latest(tmp_path))
    for a, b, c in zip(model.parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_newest_are_kept(tmp_path):
    model = llama.build(TINY)
    for step in (5, 90, 100, 1000):
        checkpoint.save(tmp_path, step, [model], {}, keep=2)
    assert [d.name for d in sorted(tmp_path.iterdir())] == ["step-00000100", "step-00001000"]
    assert checkpoint.latest(tmp_path).name == "step-00001000"


def test_a_half_written_one_is_not_seen(tmp_path, monkeypatch):
    model = llama.build(TINY)
    checkpoint.save(tmp_path, 1, [model], {}, keep=1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 2, [model], {}, keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_there_may_be_none(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_one_that_does_not_fit_is_an_error(tmp_path):
    checkpoint.save(tmp_path, 1, [llama.build(TINY)], {}, keep=1)
    wider = llama.build(replace(TINY, hidden_size=64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.load_model(checkpoint.latest(tmp_path), wider)
