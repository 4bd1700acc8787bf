"""The experiments have the papers' settings, and their small versions keep the arm."""

from dataclasses import replace

import pytest
from conftest import REPOSITORY

from adafrugal.optim import controls
from adafrugal.reports import plan, records
from adafrugal.settings.canonical import settled, with_run_length
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
    badam = found["badam"]
    assert (galore.on_refresh, badam.on_refresh, badam.state_free) == ("keep", "reset_all", "none")
    assert badam.subspace == {"kind": "blocks", "unit": "layer"}
    assert {arm for arm, o in found.items() if o.kind == "frugal" and o.subspace == "blocks"} == set(ARMS[3:])
    other = [{k: v for k, v in differing(s).items() if not k.startswith("optimizer.")} for s in made.values()]
    assert all(settings == other[0] for settings in other), "arms differ in the optimizer alone"


@pytest.mark.parametrize("size", [size for size in SIZES if size != "c4_60m"])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_same_at_every_size(size, arm, settings_of):
    assert settings_of(f"experiments={size}/{arm}").optimizer == settings_of(f"experiments=c4_60m/{arm}").optimizer


@pytest.mark.parametrize(("name", "changed"), [
    *((f"state_free/{rule}", {"state_free": rule} if rule != "signsgd" else {}) for rule in ("signsgd", "sgd", "none")),
    *((f"state_full/{rule}", {"state_full": rule} if rule != "adamw" else {}) for rule in ("adamw", "lion", "sgdm")),
    *((f"subspaces/{kind}", {"subspace": kind}) for kind in ("svd", "random", "randk", "rows", "columns", "slab")),
    *((f"modules/{where}", {f"modules.{where}": "state_free"}) for where in ("embeddings", "norms", "head")),
    ("subspaces/blocks", {}), ("modules/usual", {}),
    ("modules/columns_50", {"subspace": "columns", "interval.value": 50}),
    ("modules/by_module", {"subspace": "columns", "interval.value": 50,
                           "modules.density_scale": {"*.q_proj": 0.25, "*.k_proj": 0.25, "*.down_proj": 1.5625}}),
])  # fmt: skip
def test_a_choice_is_all_that_changes_in_its_experiment(name, changed, settings_of):
    found, usual = (differing(settings_of(f"experiments={e}")) for e in (name, "c4_130m/frugal"))
    assert {k: v for k, v in found.items() if usual.get(k) != v} == {f"optimizer.{k}": v for k, v in changed.items()}
    assert usual.keys() <= found.keys()


@pytest.mark.parametrize("words", [(), ("scale=mini", "data=embedded")], ids=["papers", "mini"])
def test_a_t_by_displacement_is_all_that_changes_and_within_lotus_range(words, settings_of):
    made, frugal = (settings_of(f"experiments=c4_130m/{arm}", *words) for arm in ("frugal_displacement", "frugal"))
    o = made.optimizer
    assert o.interval["kind"] == "displacement" and o.interval["min"] == o.interval["check"]
    assert 0.005 <= o.interval["threshold"] <= 0.02 and 25 <= o.interval["check"] <= 100
    assert replace(o, interval=frugal.optimizer.interval) == frugal.optimizer
    assert replace(made, optimizer=frugal.optimizer, arm="frugal") == frugal


def test_adagalore_is_galore_with_adafrugals_controls(settings_of):
    made, galore, adafrugal = (
        settings_of(f"experiments=c4_130m/{arm}").optimizer for arm in ("adagalore", "galore", "adafrugal")
    )
    assert (made.density, made.interval) == (adafrugal.density, adafrugal.interval)
    assert replace(made, density=galore.density, interval=galore.interval) == galore


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
    found = (s.data.source, s.data.tokenizer.normalization, s.model.vocabulary_size)
    assert found == ("mirrors/vietvault", "nfc", 4096)


def test_the_small_versions_have_the_best_rates_of_their_search(settings_of, tmp_path):
    (tmp_path / "rates.yaml").write_text((plan.TABLES / "rates.yaml").read_text())
    found = records.find([REPOSITORY / "experiments" / "results" / "mini"])
    (page,) = plan.filled(plan.pages(tmp_path), found)
    search = page.sections[0]
    if missing := sum(bool(job.missing) for job in search.jobs):
        pytest.skip(f"the search is not complete: {missing} of its runs are missing")
    for arm in ARMS:
        tried = [job for job in search.jobs if job.arm == arm and job.runs]
        best = min(tried, key=lambda job: job.runs[0].summary()["validation_loss"])
        used = settings_of(f"experiments=c4_60m/{arm}", "scale=mini", "data=embedded").optimizer
        assert best.rates == {name: getattr(used, name.partition(".")[2]) for name in best.rates}, arm


GLUE = {  # FACTS: learning rate, epochs, batch, metrics of FRUGAL's scripts
    "cola": (5e-4, 80, 256, ["matthews", "accuracy"]), "mnli": (5e-5, 30, 128, ["accuracy"]),
    "mrpc": (2e-4, 30, 16, ["accuracy", "f1"]), "qnli": (1e-4, 25, 256, ["accuracy"]),
    "qqp": (5e-5, 25, 128, ["accuracy", "f1"]), "rte": (2e-4, 80, 32, ["accuracy"]),
    "sst2": (5e-5, 60, 128, ["accuracy"]), "stsb": (1e-4, 40, 16, ["pearson", "spearman"]),
}  # fmt: skip


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize(("arm", "rank"), [("frugal", 8.0), ("signsgd", 0.0)])
def test_glue_has_the_settings_of_frugals_scripts(task, arm, rank, settings_of):
    s = settings_of(f"experiments=glue/{task}", f"optimizer={arm}")
    o, t = s.optimizer, s.trainer
    assert (o.lr, t.epochs, t.batch_size, s.data.metrics) == GLUE[task]
    assert (s.data.source, s.data.subset, s.model.name) == ("nyu-mll/glue", task, "FacebookAI/roberta-base")
    assert (t.steps, t.sequence_length, t.clip_norm, t.precision, s.eval.every) == (None, 512, 1.0, "fp16", None)
    assert (s.schedule.kind, s.schedule.warmup, s.schedule.floor, s.seed) == ("linear", 0.06, 0.0, 0)
    assert (o.subspace, o.split_lr_scale, o.state_free_lr_scale, o.on_refresh) == ("columns", 1.0, 0.1, "reset")
    assert (o.weight_decay, o.density, o.rank) == (0.1, None, {"kind": "constant", "value": rank})
    assert o.interval == {"kind": "constant", "value": 500}


def test_adafrugal_on_glue_falls_from_rank_8_to_2(settings_of):
    s = settled(settings_of("experiments=glue/rte", "optimizer=adafrugal"), 78, 768)
    assert s.optimizer.density == {"kind": "linear", "start": 8 / 768, "end": 2 / 768, "steps": None}
    assert {k: s.optimizer.interval[k] for k in ("start", "max", "every")} == {"start": 100, "max": 500, "every": 78}
    assert (s.trainer.steps, s.eval.every) == (80 * 78, 78)
