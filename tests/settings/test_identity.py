from dataclasses import fields

import pytest

from adafrugal.settings.compose import check
from adafrugal.settings.identity import NOT_PART, differing, identify, still_part
from adafrugal.settings.schema import FinetuneSettings


@pytest.fixture
def key(composed):
    def make(*overrides):
        found, choices = composed(*overrides)
        return identify(check(found, choices), choices).key

    return make


def test_the_directory_is_named_by_task_data_model_arm_and_hash(composed):
    found, choices = composed("run_root=/somewhere", "optimizer=frugal", "model=llama_9m", "seed=3")
    identity = identify(check(found, choices), choices)
    assert identity.directory.as_posix() == f"/somewhere/pretrain-embedded-llama_9m/{identity.key}"
    assert identity.key.startswith("frugal-")
    assert identity.labels == {
        "task": "pretrain", "data": "embedded", "model": "llama_9m", "arm": "frugal", "seed": 3
    }  # fmt: skip


@pytest.mark.parametrize(
    "where_not_what",
    [
        "run_root=elsewhere", "cache_root=elsewhere", "tracking=local", "tracking.mode=online", "checkpoint.every=7",
        "trainer.micro_batch_size=2", "trainer.device=cpu", "trainer.compile=true", "trainer.compile=false",
        "trainer.compile_mode=default", "model.loss_chunk_rows=50", "model.loss_chunk_rows=null",
    ],
)  # fmt: skip
def test_where_and_how_a_run_is_made_is_not_part_of_it(key, where_not_what):
    assert key(where_not_what) == key()


@pytest.mark.parametrize(
    "what",
    [
        "seed=1", "trainer.steps=501", "trainer.batch_size=16", "trainer.precision=bf16", "optimizer.lr=2e-3",
        "optimizer.density.end=0.1", "optimizer.interval.max=300", "optimizer.subspace=columns", "schedule=linear",
        "schedule.warmup=5", "eval.tokens=2048", "model=llama_9m", "data.tokenizer.model_type=unigram",
        "optimizer=frugal",
    ],
)  # fmt: skip
def test_what_a_run_is_changes_its_key(key, what):
    assert key(what) != key()


def test_an_arm_names_the_directory_beside_the_same_hash(key):
    assert key("arm=mine").split("-") == ["mine", key().split("-")[1]]


def test_two_spellings_of_one_run_have_one_key(key):
    assert key("optimizer=frugal", "optimizer.density=0.25") == key("optimizer=frugal")
    assert key("optimizer.subspace={kind:blocks}") == key()
    assert key("trainer.steps=500") == key()
    assert key("optimizer=frugal", "optimizer.density=1") == key("optimizer=frugal", "optimizer.density=1.0")
    assert key("optimizer.subspace={kind:blocks,order:descending}") == key()
    assert key("optimizer.subspace={kind:blocks,order:random}") != key()
    assert key("optimizer.density.steps=500") == key("optimizer.interval.every=25") == key()
    assert key("schedule.warmup=50") == key()
    assert key("data.tokenizer.vocabulary_size=4096") == key()
    assert key("data.tokenizer.vocabulary_size=2048") != key()
    assert key("optimizer.density.start=1", "optimizer.interval.gate=20") == key("optimizer.density.start=1.0")


def test_only_what_differs_from_the_schemas_defaults_is_hashed(composed):
    found, choices = composed("optimizer.eps=1e-6")
    differs = differing(check(found, choices))
    assert differs["optimizer.eps"] == 1e-6
    assert differs["optimizer.density.kind"] == "linear"
    assert "optimizer.density.start" not in differs, "0.25 is LinearDecay's default"
    assert differs["optimizer.interval.start"] == 25
    assert "optimizer.betas" not in differs
    assert not any(name.startswith(("trainer.device", "tracking", "run_root", "arm")) for name in differs)


def test_what_is_left_out_exists(composed):
    found, choices = composed()
    settings = check(found, choices)
    groups = ("data", "model", "trainer", "optimizer")
    names = {f"{group}.{f.name}" for group in groups for f in fields(getattr(settings, group))}
    names |= {f.name for f in fields(settings)}
    names |= {f"task.{f.name}" for f in fields(FinetuneSettings)}
    assert set(NOT_PART) <= names


def test_where_the_rate_comes_from_is_no_part_of_a_run_but_the_rate_is(key):
    run = ("experiments=glue/rte", "optimizer=frugal")
    assert key(*run, "task.lr=1e-3") == key(*run, "optimizer.lr=1e-3") != key(*run)
    assert key("experiments=glue/rte", "optimizer=adamw", "task.lr=1") == key("experiments=glue/rte", "optimizer=adamw")


def test_a_rank_has_one_spelling(key):
    run = ("experiments=glue/rte", "optimizer=frugal")
    assert key(*run, "optimizer.rank=4") == key(*run, "optimizer.rank={kind:constant,value:4.0}") != key(*run)
    linear = ("experiments=glue/rte", "optimizer=adafrugal", "trainer.epochs=null", "trainer.steps=100")
    assert key(*linear, "optimizer.rank.steps=100") == key(*linear)


def test_names_that_were_part_of_old_records_are_left_out():
    theirs = {"seed": 1, "trainer.compile": True, "model.loss_chunk_rows": 2048, "optimizer.lr": 0.1}
    assert still_part(theirs) == {"seed": 1, "optimizer.lr": 0.1}
