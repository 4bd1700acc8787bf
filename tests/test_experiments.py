"""The pre-training experiments have the papers' settings, and their small versions keep the arm."""

from dataclasses import replace

import pytest
from conftest import REPOSITORY

from adafrugal.optim import controls
from adafrugal.reports import plan, records
from adafrugal.settings.canonical import with_run_length
from adafrugal.settings.compose import check
from adafrugal.settings.identity import differing

ARMS = ("adamw", "galore", "badam", "frugal", "frugal_0", "adafrugal_density", "adafrugal_interval", "adafrugal")
SIZES = {  # FACTS: micro-batch a device, warm-up, cycle, steps, hidden size, layers
    "c4_60m": (256, 1_000, 10_000, 200_000, 512, 8),
    "c4_130m": (256, 2_000, 20_000, 200_000, 768, 12),
    "c4_350m": (128, 6_000, 60_000, 300_000, 1024, 24),
    "c4_1b": (32, 10_000, 100_000, 500_000, 2048, 24),
    "vietvault_130m": (256, 2_000, 20_000, 200_000, 768, 12),
}
STATIC, LADDER = {"kind": "constant", "value": 200}, {"kind": "loss_aware", "start": 100, "max": 1000, "every": 5000}


@pytest.fixture
def settings_of(composed):
    """A function: overrides -> checked settings."""
    return lambda *overrides: check(*composed(*overrides))


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_settings_of_frugals_script(size, settings_of):
    s = settings_of(f"experiments={size}/frugal")
    micro, warmup, cycle, steps, hidden, layers = SIZES[size]
    assert (s.trainer.batch_size, s.trainer.sequence_length, s.trainer.precision) == (512, 256, "bf16")
    assert (s.trainer.micro_batch_size, s.trainer.steps, s.trainer.clip_norm) == (micro, steps, None)
    assert (s.schedule.kind, s.schedule.warmup or cycle // 10, s.schedule.cycle) == ("cosine_restarts", warmup, cycle)
    assert (s.schedule.floor, s.eval.every, s.eval.tokens, s.seed) == (0.1, 2000, 10_000_000, 0)
    assert (s.model.hidden_size, s.model.num_hidden_layers, s.model.vocabulary_size) == (hidden, layers, 32_000)
    o = s.optimizer
    assert (o.lr, o.betas, o.eps, o.weight_decay) == (1e-3, [0.9, 0.999], 1e-8, 0)
    if size.startswith("c4"):
        assert (s.data.source, s.data.rows, s.data.tokenizer.name) == ("allenai/c4", "document", "t5-base")


def test_arms_have_the_settings_of_the_papers(settings_of):
    made = {arm: settings_of(f"experiments=c4_60m/{arm}") for arm in ARMS}
    found = {arm: s.optimizer for arm, s in made.items()}
    assert found["adamw"].kind == "adamw"
    for arm, density, interval in (
        ("galore", 0.25, STATIC), ("badam", 0.25, STATIC), ("frugal", 0.25, STATIC), ("frugal_0", 0, STATIC),
        ("adafrugal_density", (0.25, 0.05), STATIC), ("adafrugal_interval", 0.25, LADDER),
        ("adafrugal", (0.25, 0.05), LADDER),
    ):  # fmt: skip
        control = controls.density(with_run_length(found[arm].density, 200_000))
        start, end = density if isinstance(density, tuple) else (density, density)
        assert (control.at(0), control.at(100_000), control.at(200_000)) == (start, (start + end) / 2, end), arm
        assert {key: found[arm].interval[key] for key in interval} == interval, arm
    galore = found["galore"]
    assert (galore.lr, galore.split_lr_scale, galore.subspace, galore.state_free) == (0.01, 0.25, "svd", "none")
    assert (galore.on_refresh, found["badam"].on_refresh) == ("keep", "reset_all")
    assert {arm for arm, o in found.items() if o.kind == "frugal" and o.subspace == "blocks"} == set(ARMS[3:])
    other = [{k: v for k, v in differing(s).items() if not k.startswith("optimizer.")} for s in made.values()]
    assert all(settings == other[0] for settings in other), "arms differ in the optimizer alone"


@pytest.mark.parametrize("size", [size for size in SIZES if size != "c4_60m"])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_same_at_every_size(size, arm, settings_of):
    assert settings_of(f"experiments={size}/{arm}").optimizer == settings_of(f"experiments=c4_60m/{arm}").optimizer


def test_badams_layers_take_turns_from_the_last_and_all_state_begins_anew(settings_of):
    badam = settings_of("experiments=c4_60m/badam").optimizer
    assert (badam.subspace, badam.on_refresh, badam.state_free) == (
        {"kind": "blocks", "unit": "layer"},
        "reset_all",
        "none",
    )


@pytest.mark.parametrize(("name", "changed"), [
    ("state_free/signsgd", {}), ("state_free/sgd", {"state_free": "sgd"}), ("state_free/none", {"state_free": "none"}),
    ("state_full/adamw", {}), ("state_full/lion", {"state_full": "lion"}), ("state_full/sgdm", {"state_full": "sgdm"}),
    ("modules/usual", {}),
])  # fmt: skip
def test_a_rule_is_all_that_changes_in_its_experiment(name, changed, settings_of):
    found, usual = (differing(settings_of(f"experiments={e}")) for e in (name, "c4_130m/frugal"))
    assert {k: v for k, v in found.items() if usual.get(k) != v} == {f"optimizer.{k}": v for k, v in changed.items()}
    assert usual.keys() <= found.keys()


def test_adagalore_is_galore_with_adafrugals_controls(settings_of):
    made, galore, adafrugal = (
        settings_of(f"experiments=c4_130m/{arm}").optimizer for arm in ("adagalore", "galore", "adafrugal")
    )
    assert (made.density, made.interval) == (adafrugal.density, adafrugal.interval)
    assert replace(made, density=galore.density, interval=galore.interval) == galore


@pytest.mark.parametrize("name", ["svd", "random", "randk", "rows", "columns", "blocks", "slab"])
def test_a_subspace_is_all_that_changes_in_its_experiment(name, settings_of):
    found, usual = (differing(settings_of(f"experiments={e}")) for e in (f"subspaces/{name}", "c4_130m/frugal"))
    assert {k: v for k, v in found.items() if usual.get(k) != v} == (
        {} if name == "blocks" else {"optimizer.subspace": name}
    )


@pytest.mark.parametrize("where", ["embeddings", "norms", "head"])
def test_a_module_without_state_is_permanently_so(where, settings_of):
    found = settings_of(f"experiments=modules/{where}").optimizer.modules
    assert {name for name in ("embeddings", "norms", "head") if getattr(found, name) == "state_free"} == {where}


@pytest.mark.parametrize("arm", ARMS)
def test_the_small_version_keeps_the_arm_and_follows_its_rules(arm, settings_of):
    large = settings_of(f"experiments=c4_60m/{arm}")
    small = settings_of(f"experiments=c4_60m/{arm}", "scale=mini", "data=embedded")
    assert (small.trainer.steps, small.schedule.warmup, small.schedule.cycle) == (400, None, None)
    assert small.eval.tokens < small.eval.last_tokens
    of_scale = {"lr", "split_lr_scale", "state_free_lr_scale", "interval"}
    for name in vars(large.optimizer).keys() - of_scale:
        assert getattr(small.optimizer, name) == getattr(large.optimizer, name), name
    if arm != "adamw":
        interval = small.optimizer.interval
        assert interval["kind"] == large.optimizer.interval["kind"]
        assert interval.get("value", (interval.get("start"), interval.get("max"))) in (50, (25, 250))
        assert interval.get("every") is None


def test_a_small_version_reads_the_text_that_is_typed(settings_of):
    s = settings_of("experiments=c4_60m/frugal", "scale=mini", "data.source=mirrors/c4")
    assert (s.data.kind, s.data.source, s.data.tokenizer.kind) == ("corpus", "mirrors/c4", "train")
    s = settings_of("experiments=vietvault_130m/frugal", "scale=mini", "data.source=mirrors/vietvault")
    assert (s.data.source, s.data.tokenizer.normalization, s.model.vocabulary_size) == (
        "mirrors/vietvault",
        "nfc",
        4096,
    )


@pytest.mark.parametrize(("given", "steps"), [(0.25, 100), (0.001, 1), (None, 400), (70, 70)])
def test_a_decay_may_last_a_share_of_the_run(given, steps):
    assert with_run_length({"kind": "linear", "steps": given}, 400)["steps"] == steps


def test_the_small_versions_have_the_best_rates_of_their_search(settings_of, tmp_path):
    (tmp_path / "rates.yaml").write_text((plan.TABLES / "rates.yaml").read_text())
    found = records.find([REPOSITORY / "experiments" / "results" / "mini"])
    (page,) = plan.filled(plan.pages(tmp_path), found)
    search = page.sections[0]
    if any(job.missing for job in search.jobs):
        pytest.skip(
            f"the search is not complete: {sum(bool(job.missing) for job in search.jobs)} of its runs are missing"
        )
    for arm in ARMS:
        tried = [job for job in search.jobs if job.arm == arm and job.runs]
        best = min(tried, key=lambda job: job.runs[0].summary()["validation_loss"])
        used = settings_of(f"experiments=c4_60m/{arm}", "scale=mini", "data=embedded").optimizer
        assert best.rates == {name: getattr(used, name.partition(".")[2]) for name in best.rates}, arm
