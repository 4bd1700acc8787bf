"""A density chosen so that the run fits."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from adafrugal.memory import __main__ as command
from adafrugal.memory import breakdown, card, fit
from adafrugal.memory.estimate import estimate
from adafrugal.memory.trace import Footprint
from adafrugal.system.errors import SettingError
from adafrugal.system.signals import Stop
from adafrugal.training.session import run

GIB = 2**30
ALL = "as much as trainer.batch_size=8 gives: a larger one may fit, too"


@pytest.fixture
def gib_by_gib(monkeypatch):
    """Stand-in for the estimate: a peak of (ρ + rows ÷ 8) GiB, but densities below 0.02 select nothing."""

    def foretold(settings):
        density, rows = settings.optimizer.density["value"], settings.trainer.micro_batch_size or 8
        if density < 0.02:
            raise SettingError("optimizer: it selects nothing")
        return SimpleNamespace(peak=Footprint(0, 0, round(density * GIB), rows * GIB // 8, 0, "backward"))

    monkeypatch.setattr(fit, "estimate", foretold)


@pytest.mark.usefixtures("gib_by_gib")
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_largest_density_that_fits_is_taken(kind, settings):
    """In hundredths, and none above the one that is set."""
    ceiling = "value=0.9" if kind == "constant" else "start=0.9"
    chosen, _ = settings(f"optimizer/density={kind}", f"optimizer.density.{ceiling}")
    for gib, density in ((1.3, 0.3), (1.345, 0.34), (1.075, 0.07), (100, 0.9)):
        chosen.optimizer.fit_gib = gib
        assert fit.fitted(chosen) == fit.Fitted(density, round((1 + density) * GIB))


@pytest.mark.usefixtures("gib_by_gib")
@pytest.mark.parametrize(("words", "smallest"), [
    (["optimizer=adafrugal"], "1.05 or more, the estimate with ρ 0.05 "),  # the end of the decay
    (["optimizer=frugal", "optimizer.density=0.9"], "1.02 or more, the estimate with ρ 0.02 "),
    (["optimizer=badam", "optimizer.density=0.9"], "1.50 or more, the estimate with ρ 0.5 "),  # one of two layers
])  # fmt: skip
def test_a_budget_in_which_nothing_fits_is_refused_with_one_that_would_do(words, smallest, settings):
    with pytest.raises(SettingError, match=smallest):
        fit.fitted(settings(*words, "optimizer.fit_gib=0.9")[0])


@pytest.mark.usefixtures("gib_by_gib")
def test_what_fits_is_a_divisor_of_the_batch_and_a_density(settings):
    chosen, _ = settings("optimizer=frugal")
    for gib, rows, density in (
        (0.8, "the largest micro-batch is 4\n", "no ρ fits with the micro-batch of 8 that is set"),
        (1.6, f"the largest micro-batch is 8, {ALL}\n", "the largest ρ is 0.6 with the micro-batch of 8 that is set"),
        (0.3, "not even a micro-batch of one row fits\n", "no ρ fits"),
    ):
        said = breakdown.what_fits(chosen, card.of_words(str(gib)))
        assert rows in said and density in said and "tensors alone" in said


@pytest.mark.usefixtures("gib_by_gib")
def test_a_card_must_have_more_than_the_tensors(settings, capsys):
    """0.35 + a tenth of the (rows ÷ 8) GiB that come and go + 0.86 GiB of context."""
    words = ["optimizer=frugal", "optimizer.density.value=0.9"]
    chosen, _ = settings(*words, "optimizer.density.fit_card_gib=2.65")
    found = fit.fitted(chosen)
    assert found.density == 0.34
    assert found.peak == pytest.approx((1.34 + 0.35 + 0.1 + 0.86) * GIB, abs=10)
    assert breakdown.chosen(chosen, found) == (
        "ρ begins at 0.34: 2.65 GiB for the whole card by the estimate, of 2.65 (optimizer.fit_card_gib)"
    )
    with pytest.raises(SettingError, match=r"optimizer.fit_card_gib is 2; allowed: 2.33 or more, the estimate with ρ"):
        fit.fitted(settings(*words, "optimizer.fit_card_gib=2")[0])
    assert command.main(["scale=smoke", "optimizer=frugal", "--fits", "2.5gb"]) == 0  # of which torch sees 2
    said, told = capsys.readouterr()
    assert told == "making about a dozen estimates of frugal to find what fits: minutes if the model is large\n"
    assert "frugal in 2 GiB (--fits 2.5gb; what the card must have):" in said
    assert "the largest micro-batch is 2\n" in said and "no ρ fits" in said  # 0.25 + 0.25 + 0.35 + 0.025 + 0.86


@pytest.mark.usefixtures("gib_by_gib")
def test_with_updates_in_the_backward_pass_the_batch_is_what_fits(capsys):
    assert command.main(["scale=smoke", "optimizer=frugal", "trainer.update_in_backward=true", "--fits", "0.8"]) == 0
    assert "the largest batch is 4\n" in capsys.readouterr().out


def test_the_density_chosen_by_real_estimates_fits_and_a_larger_one_does_not(settings):
    words = ["optimizer=frugal", "optimizer.subspace=columns", "model.num_hidden_layers=1"]
    peaks = {d: estimate(settings(*words, f"optimizer.density={d}")[0]).peak.total for d in (0.4, 0.5)}
    budget = (peaks[0.4] + peaks[0.5]) / 2
    falling = ["optimizer/density=linear", "optimizer.density.start=0.5", "optimizer.density.end=0.4"]
    found = fit.fitted(settings(*words, *falling, f"optimizer.fit_gib={budget / GIB}")[0])
    assert 0.4 < found.density < 0.5
    assert peaks[0.4] <= found.peak <= budget
    assert found.peak == estimate(settings(*words, f"optimizer.density={found.density}")[0]).peak.total


@pytest.mark.usefixtures("no_estimate")
def test_a_run_chooses_once_and_its_record_has_the_choice(settings, monkeypatch, tmp_path):
    words = ["trainer.steps=10", "trainer.log_every=1", "checkpoint.every=5", "optimizer.density.fit_gib=1"]
    chosen, choices = settings(*words, "optimizer.subspace=columns")
    asked, stops = [], iter([False] * 6 + [True] + [False] * 100)
    monkeypatch.setattr(fit, "fitted", lambda _: asked.append(0) or fit.Fitted(0.15, 1000))
    whole, outcome = run(chosen, choices)
    assert outcome == "finished"
    (event,) = [event for event in whole.events() if event["event"] == "fitted"]
    assert (event["density"], event["peak"]) == (0.15, 1000)
    assert 0.9 * 0.15 < whole.metrics()[0]["density"] <= 0.15
    monkeypatch.setattr(Stop, "requested", property(lambda _: next(stops), lambda *_: None), raising=False)
    other = replace(chosen, run_root=str(tmp_path / "other"))
    assert [run(other, choices)[1] for _ in range(2)] == ["interrupted", "finished"]
    parts, _ = run(other, choices)
    assert len(asked) == 2, "a resumed run does not choose again"
    assert [line["density"] for line in parts.metrics()] == [line["density"] for line in whole.metrics()]
    assert [event["density"] for event in parts.events() if event["event"] == "fitted"] == [0.15]


def test_a_rank_is_fitted_as_a_density(capsys):
    words = ["optimizer=frugal", "optimizer.subspace=columns", "optimizer.density=null", "optimizer.rank=16"]
    assert command.main(["scale=smoke", *words, "optimizer.fit_gib=1"]) == 0
    assert "ρ begins at 0.5: 0.01 GiB by the estimate, of 1 (optimizer.fit_gib)" in capsys.readouterr().out


def test_a_summary_has_the_estimate_beside_what_was_measured_of_the_first_run_of_a_process(settings, monkeypatch):
    monkeypatch.setattr("adafrugal.training.run._begun", itertools.count())
    (chosen, choices), other = settings("trainer.steps=2"), settings("trainer.steps=2", "seed=1")
    memory, second = (run(*each)[0].summary()["memory"] for each in ((chosen, choices), other))
    assert (memory["alone"], second["alone"]) == (True, False)
    assert second["estimate"] and not {"grown", "estimate_error"} & second.keys(), "of both runs, so it is left out"
    assert memory["estimate"] == estimate(chosen).peak.total
    assert memory["estimate_error"] == pytest.approx(memory["estimate"] / memory["grown"] - 1)
    assert memory["estimate_phase"] == "backward"


def test_a_run_does_not_fail_for_want_of_an_estimate(settings, monkeypatch):
    def fails(_):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr("adafrugal.memory.estimate.estimate", fails)
    record, outcome = run(*settings("trainer.steps=2"))
    assert outcome == "finished"
    assert "estimate" not in record.summary()["memory"]
    assert any("no such luck" in event.get("text", "") for event in record.events())
