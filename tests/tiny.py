"""Fixtures for tests of runs in this process."""

import gc
import importlib
import math

import pytest
import torch

from adafrugal.settings.schema import LlamaSettings

TINY = LlamaSettings(
    vocabulary_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


@pytest.fixture
def model():
    """A LLaMA of two layers."""
    from adafrugal.models import llama

    torch.manual_seed(0)
    return llama.build(TINY)


@pytest.fixture(scope="session")
def imported():
    """All that runs import, out of the garbage collector's sight: each run collects at its end."""
    for name in ("adafrugal.training.run", "adafrugal.training.tasks.pretrain", "adafrugal.training.tasks.finetune",
                 "transformers.models.llama.modeling_llama", "datasets", "sklearn.metrics"):  # fmt: skip
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_estimate(imported, monkeypatch):
    """A finished run's summary is without the estimate of its memory, which takes longer than these runs."""
    from adafrugal.training.run import Run

    monkeypatch.setattr(Run, "_add_estimate", lambda run, summary: None)


@pytest.fixture
def finished(settings):
    """A function that makes a tiny run to its end: overrides -> its record."""
    from adafrugal.training.session import run

    def make(*overrides):
        record, outcome = run(*settings(*overrides))
        assert outcome == "finished"
        return record

    return make


@pytest.fixture(scope="session")
def smoke(composed, cache_root, tmp_path_factory, imported):
    """The record of the run that docs/runs.md loads and evaluates: `python train.py scale=smoke`."""
    from adafrugal.settings.compose import check
    from adafrugal.training.session import run

    places = [f"run_root={tmp_path_factory.mktemp('smoke') / 'runs'}", f"cache_root={cache_root}", "tracking=local"]
    found, choices = composed("scale=smoke", *places)
    record, outcome = run(check(found, choices), choices)
    assert outcome == "finished"
    return record


@pytest.fixture
def poison(monkeypatch):
    """A function after which pre-training has losses at some steps that are no numbers: steps, kind -> None."""
    from adafrugal.training.tasks.pretrain import Pretrain

    def make(*steps, kind=math.nan):
        work, loss, current = Pretrain.work, Pretrain.loss, []

        def poisoned(self, batch):
            return loss(self, batch) * (kind if self.model.training and current[-1] in steps else 1)

        monkeypatch.setattr(Pretrain, "work", lambda self, step: current.append(step) or work(self, step))
        monkeypatch.setattr(Pretrain, "loss", poisoned)

    return make
