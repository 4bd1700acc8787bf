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
    labels = {"task": "pretrain", "data": "embedded", "model": "llama_9m", "arm": "frugal", "seed": 3}
    assert identity.labels == labels


def test_the_default_run_and_one_of_each_paper_keep_the_identity_of_the_first_records(key):
    assert key() == "adafrugal-a78b40b200"
    assert key("experiments=c4_130m/adafrugal") == "adafrugal-9435fbe269"
    assert key("experiments=glue/rte", "optimizer=frugal") == "frugal-693fd0b716"


def test_where_and_how_a_run_is_made_is_not_part_of_it(key):
    places = ("run_root=elsewhere", "cache_root=elsewhere", "checkpoint.every=7", "trainer.micro_batch_size=2")
    how = ("trainer.device=cpu", "trainer.compile_mode=default", "model.loss_chunk_rows=50", "data.processes=1")
    assert key(*places, *how, "tracking=local", "trainer.compile=true") == key()
    assert key("trainer.compile=false", "tracking.mode=online", "model.loss_chunk_rows=null") == key()


WHAT = (
    "seed=1", "trainer.steps=501", "trainer.batch_size=16", "trainer.precision=bf16", "optimizer.lr=2e-3",
    "optimizer.density.end=0.1", "optimizer.interval.max=300", "optimizer.subspace=columns", "schedule=linear",
    "schedule.warmup=5", "eval.tokens=2048", "model=llama_9m", "data.tokenizer.model_type=unigram", "optimizer=frugal",
    "data.tokenizer.vocabulary_size=2048", "optimizer.subspace={kind:blocks,order:random}",
)  # fmt: skip


def test_what_a_run_is_changes_its_key(key):
    assert len({key(), *map(key, WHAT)}) == 1 + len(WHAT)


def test_an_arm_names_the_directory_beside_the_same_hash(key):
    assert key("arm=mine").split("-") == ["mine", key().split("-")[1]]


def test_two_spellings_of_one_run_have_one_key(key):
    nulls = ("optimizer.density.steps=500", "optimizer.interval.every=25", "schedule.warmup=50")
    whole = ("optimizer.density.start=0.25", "optimizer.interval.gate=20", "data.tokenizer.vocabulary_size=4096")
    assert key("trainer.steps=500", "optimizer.subspace={kind:blocks,order:descending}", *nulls, *whole) == key()
    assert key("optimizer=frugal", "optimizer.density=0.25") == key("optimizer=frugal")
    assert key("optimizer=frugal", "optimizer.density=1") == key("optimizer=frugal", "optimizer.density=1.0")


def test_a_rank_has_one_spelling(key):
    run = ("experiments=glue/rte", "optimizer=frugal")
    assert key(*run, "optimizer.rank=4") == key(*run, "optimizer.rank={kind:constant,value:4.0}") != key(*run)
    linear = ("experiments=glue/rte", "optimizer=adafrugal", "trainer.epochs=null", "trainer.steps=100")
    assert key(*linear, "optimizer.rank.steps=100") == key(*linear)


def test_where_the_rate_comes_from_is_no_part_of_a_run_but_the_rate_is(key):
    run = ("experiments=glue/rte", "optimizer=frugal")
    assert key(*run, "task.lr=1e-3") == key(*run, "optimizer.lr=1e-3") != key(*run)
    assert key("experiments=glue/rte", "optimizer=adamw", "task.lr=1") == key("experiments=glue/rte", "optimizer=adamw")


def test_only_what_differs_from_the_schemas_defaults_is_hashed(composed):
    differs = differing(check(*composed("optimizer.eps=1e-6")))
    assert differs["optimizer.eps"] == 1e-6
    assert differs["optimizer.density.kind"] == "linear"
    assert "optimizer.density.start" not in differs, "0.25 is LinearDecay's default"
    assert differs["optimizer.interval.start"] == 25
    assert "optimizer.betas" not in differs
    assert not any(name.startswith(("trainer.device", "tracking", "run_root", "arm")) for name in differs)


def test_what_is_left_out_exists(settings_of):
    settings = settings_of()
    parts = {"": settings, "task.": FinetuneSettings()}
    parts |= {f"{group}.": getattr(settings, group) for group in ("data", "model", "trainer", "optimizer")}
    gone = {"data.store"}  # which is in old records
    assert set(NOT_PART) - gone <= {f"{path}{f.name}" for path, part in parts.items() for f in fields(part)}


def test_names_that_were_part_of_old_records_are_left_out():
    theirs = {"seed": 1, "trainer.compile": True, "model.loss_chunk_rows": 2048, "optimizer.lr": 0.1}
    assert still_part(theirs) == {"seed": 1, "optimizer.lr": 0.1}
