"""A density that is chosen so that the run fits."""

from dataclasses import replace

import pytest

from adafrugal.memory import __main__ as command
from adafrugal.memory import fit
from adafrugal.memory.estimate import estimate
from adafrugal.system.errors import SettingError
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

GIB = 2**30
SMALL = ["trainer.batch_size=1", "trainer.sequence_length=8", "model.hidden_size=64", "model.intermediate_size=176"]


def peak(settings, density):
    chosen, _ = settings(*SMALL, "optimizer=frugal", f"optimizer.density={density}")
    return estimate(chosen).peak.total


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_largest_density_that_fits_is_taken(kind, settings):
    """The estimate with it stays under the budget, and with a hundredth more it would not."""
    budget = (peak(settings, 0.3) + peak(settings, 0.4)) / 2
    ceiling = "value=0.9" if kind == "constant" else "start=0.9"
    words = ["optimizer.subspace=columns", f"optimizer/density={kind}", f"optimizer.density.{ceiling}"]
    chosen, _ = settings(*SMALL, "optimizer=adafrugal", *words, f"optimizer.density.fit_gib={budget / GIB}")
    found = fit.fitted(chosen)
    assert 0.05 < found.density < 0.9
    assert found.peak <= budget

    def columns(density):
        return estimate(fit.beginning_with(settings(*SMALL, "optimizer=frugal", words[0])[0], density)).peak.total

    assert columns(found.density) == found.peak
    assert columns(found.density + 0.01) > budget


def test_what_is_set_is_not_exceeded(settings):
    chosen, _ = settings("optimizer=adafrugal", "optimizer.fit_gib=100")
    assert fit.fitted(chosen).density == 0.25


def test_a_budget_under_which_nothing_fits_is_refused_with_what_would(settings):
    chosen, _ = settings("optimizer=adafrugal", "optimizer.density.fit_gib=0.001")
    with pytest.raises(SettingError, match=r"optimizer.fit_gib is 0.001; allowed: 0.01 or more, the estimate with ρ"):
        fit.fitted(chosen)


def columns_between(settings, low, high):
    """Settings of a run whose ρ begins between two densities, since its budget lies between their peaks."""
    words = [*SMALL, "optimizer.subspace=columns", "trainer.log_every=1", "checkpoint.every=5"]
    peaks = []
    for density in (low, high):
        chosen, _ = settings(*words, "optimizer=frugal", f"optimizer.density={density}")
        peaks.append(estimate(chosen).peak.total)
    return settings(*words, f"optimizer.density.fit_gib={sum(peaks) / 2 / GIB}")


def test_a_run_chooses_once_and_its_record_says_what(settings, monkeypatch, tmp_path):
    chosen, choices = columns_between(settings, 0.1, 0.2)
    whole, outcome = run(chosen, choices)
    assert outcome == "finished"
    (event,) = [event for event in whole.events() if event["event"] == "fitted"]
    assert 0.1 <= event["density"] <= 0.2
    first = whole.metrics()[0]["density"]
    assert 0.9 * event["density"] < first <= event["density"]
    with monkeypatch.context() as patched:
        steps, train_step = [], Loop._train_step

        def fails_at_nine(self, work):
            steps.append(len(steps) + 1)
            if steps[-1] == 9:
                raise ZeroDivisionError
            train_step(self, work)

        patched.setattr(Loop, "_train_step", fails_at_nine)
        with pytest.raises(ZeroDivisionError):
            run(replace(chosen, run_root=str(tmp_path / "other")), choices)
    monkeypatch.setattr(fit, "fitted", None)  # which a run that goes on does not ask again
    again, outcome = run(replace(chosen, run_root=str(tmp_path / "other")), choices)
    assert outcome == "finished"
    assert [line["density"] for line in again.metrics()] == [line["density"] for line in whole.metrics()]
    assert [event["density"] for event in again.events() if event["event"] == "fitted"] == [event["density"]]


def test_what_has_no_residual_is_not_fitted_to_nothing(settings):
    chosen, _ = settings("optimizer=badam", "optimizer.density=0.9", "optimizer.fit_gib=0.001")
    with pytest.raises(SettingError, match=r"allowed: 0.01 or more, the estimate with ρ 0.5 "):
        fit.fitted(chosen)


def test_a_rank_is_fitted_as_a_density(settings, capsys):
    words = ["optimizer=frugal", "optimizer.subspace=columns", "optimizer.density=null", "optimizer.rank=16"]
    assert command.main(["scale=smoke", *words, "optimizer.fit_gib=1"]) == 0
    assert "ρ begins at 0.5: 0.01 GiB by the estimate, of 1 (optimizer.fit_gib)" in capsys.readouterr().out


def test_with_updates_in_the_backward_pass_it_is_the_batch_that_fits(settings, capsys):
    assert command.main(["scale=smoke", "trainer.update_in_backward=true", "--fits", "1"]) == 0
    assert "the largest batch is 8\n" in capsys.readouterr().out


def test_a_summary_has_the_estimate_beside_what_was_measured(settings):
    chosen, choices = settings()
    record, _ = run(chosen, choices)
    memory = record.summary()["memory"]
    assert memory["estimate"] == estimate(chosen).peak.total
    assert memory["estimate_error"] == pytest.approx(memory["estimate"] / memory["grown"] - 1)
    assert memory["estimate_phase"] == "backward"


def test_a_run_does_not_fail_for_want_of_an_estimate(settings, monkeypatch):
    def fails(_):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr("adafrugal.memory.estimate.estimate", fails)
    record, outcome = run(*settings())
    assert outcome == "finished"
    assert "estimate" not in record.summary()["memory"]
    assert any("no such luck" in event.get("text", "") for event in record.events())
