"""The time of a run, from a few of its steps."""

import pytest

from adafrugal.training import few_steps
from adafrugal.training.few_steps import Measured


@pytest.mark.parametrize(
    "words",
    [["optimizer=adamw"], ["optimizer.subspace=svd", "trainer.micro_batch_size=2"], ["data.mask_documents=true"]],
)
def test_steps_are_timed_without_data(words, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen, _ = settings(*words, "trainer.device=cpu", f"cache_root={tmp_path / 'none'}")
    found = few_steps.measure(chosen)
    assert (found.arm, found.device, found.steps) == (chosen.arm, "cpu", few_steps.STEPS)
    assert 0 < found.evaluated * chosen.trainer.batch_size * chosen.trainer.sequence_length < found.step < 10
    assert (found.refresh > 0) == ("adamw" not in words[0])
    assert [*tmp_path.iterdir()] == []


def test_slow_steps_are_fewer(settings, monkeypatch):
    monkeypatch.setattr(few_steps, "ENOUGH", 0.0)
    assert few_steps.measure(settings("optimizer=adamw")[0]).steps == few_steps.WARM_UP + 1


def test_a_run_takes_its_steps_refreshes_and_evaluations():
    assert Measured("adafrugal", "cpu", 20, 0.5, 2.0, 1e-3).seconds(100, 4, 5000) == 50 + 8 + 5


def test_memory_that_is_refused_is_a_reason(settings, monkeypatch):
    def refused(*_):
        raise MemoryError

    monkeypatch.setattr(few_steps, "_measured", refused)
    assert few_steps.measure(settings("optimizer=adamw")[0]) == "adamw does not fit into the memory here"
