from dataclasses import fields

import pytest

from adafrugal.settings.compose import check
from adafrugal.settings.identity import NOT_PART, differing, identify, still_part
from adafrugal.settings.schema import FinetuneSettings


@pytest.fixture
def identity(composed):
    """A function: words -> the identity of their run."""

    def make(words):
        found, choices = composed(*words.split())
        return identify(check(found, choices), choices)

    return make


def test_the_directory_is_named_by_task_data_model_arm_and_hash(identity):
    found = identity("run_root=/somewhere optimizer=frugal model=llama_9m seed=3")
    assert found.directory.as_posix() == f"/somewhere/pretrain-embedded-llama_9m/{found.key}"
    assert found.key.startswith("frugal-")
    labels = {"task": "pretrain", "data": "embedded", "model": "llama_9m", "arm": "frugal", "seed": 3}
    assert found.labels == labels


RTE, ADA = "experiments=glue/rte optimizer=frugal", "experiments=glue/rte optimizer=adafrugal"
STEPS = "trainer.epochs=null trainer.steps=100"


@pytest.mark.parametrize(("words", "key"), [
    ("", "adafrugal-a78b40b200"), ("experiments=c4_130m/adafrugal", "adafrugal-9435fbe269"),
    (RTE, "frugal-693fd0b716"),
])  # fmt: skip
def test_the_default_run_and_one_of_each_paper_keep_the_identity_of_the_first_records(words, key, identity):
    assert identity(words).key == key


@pytest.mark.parametrize(("typed", "same"), [
    # where and how a run is made
    ("run_root=elsewhere cache_root=elsewhere checkpoint.every=7 trainer.micro_batch_size=2 trainer.device=cpu "
     "trainer.compile_mode=default model.loss_chunk_rows=50 data.processes=1 tracking=local trainer.compile=true", ""),
    ("trainer.compile=false tracking.mode=online model.loss_chunk_rows=null", ""),
    # nulls, defaults and numbers that are typed
    ("trainer.steps=500 optimizer.subspace={kind:blocks,order:descending} optimizer.density.steps=500 "
     "optimizer.interval.every=25 schedule.warmup=50 optimizer.density.start=0.25 optimizer.interval.gate=20 "
     "data.tokenizer.vocabulary_size=4096", ""),
    ("schedule.warmup=0.1", ""),
    ("schedule=cosine_restarts schedule.cycle=50 schedule.warmup=0.1", "schedule=cosine_restarts schedule.cycle=50"),
    ("schedule=wsd schedule.cooldown=0.2", "schedule=wsd schedule.cooldown=100"),
    ("schedule=wsd schedule.cooldown=100", "schedule=wsd"),
    ("optimizer=frugal optimizer.density=0.25", "optimizer=frugal"),
    ("optimizer=frugal optimizer.density=1", "optimizer=frugal optimizer.density=1.0"),
    ("optimizer=frugal optimizer.modules.density_scale={}", "optimizer=frugal"),
    ("optimizer=frugal optimizer.modules.density_scale={*.up_proj:2}",
     "optimizer=frugal optimizer.modules.density_scale={*.up_proj:2.0}"),
    (f"{RTE} optimizer.rank=4", f"{RTE} optimizer.rank={{kind:constant,value:4.0}}"),
    (f"{ADA} {STEPS} optimizer.rank.steps=100", f"{ADA} {STEPS}"),
    # where the rate comes from
    (f"{RTE} task.lr=1e-3", f"{RTE} optimizer.lr=1e-3"),
    ("experiments=glue/rte optimizer=adamw task.lr=1", "experiments=glue/rte optimizer=adamw"),
])  # fmt: skip
def test_one_run_has_one_key_however_it_is_typed(typed, same, identity):
    assert identity(typed).key == identity(same).key


WHAT = (
    "seed=1", "data.seed=1", "data.seed=0",
    "trainer.steps=501", "trainer.batch_size=16", "trainer.precision=bf16", "optimizer.lr=2e-3",
    "optimizer.density.end=0.1", "optimizer.interval.max=300", "optimizer.subspace=columns", "schedule=linear",
    "schedule.warmup=5", "eval.tokens=2048", "model=llama_9m", "data.tokenizer.model_type=unigram", "optimizer=frugal",
    "data.tokenizer.vocabulary_size=2048", "optimizer.subspace={kind:blocks,order:random}", RTE,
    "optimizer=frugal optimizer.modules.density_scale={*.up_proj:2}", f"{RTE} optimizer.rank=4", f"{RTE} task.lr=1e-3",
)  # fmt: skip


def test_what_a_run_is_changes_its_key_and_an_arm_names_the_directory_beside_the_same_hash(identity):
    assert len({identity(words).key for words in ("", *WHAT)}) == 1 + len(WHAT)
    assert identity("arm=mine").key.split("-") == ["mine", identity("").key.split("-")[1]]


def test_a_place_of_weights_may_be_any_text(settings_of):
    assert settings_of("model.weights='a\0b'").model.weights == "a\0b"


def test_a_share_of_a_length_that_is_not_known_is_no_tenth_or_fifth(identity):
    """0.1 and 0.2 of 8 steps are 1 and 2; a tenth is 0, a fifth 1."""
    epochs = f"{RTE} schedule=wsd trainer.steps=null trainer.epochs=1 schedule.warmup="
    assert len({identity(f"{epochs}{more}").key for more in ("null", "0.1", "null schedule.cooldown=0.2")}) == 3


def test_only_what_differs_from_the_schemas_defaults_is_hashed(settings_of):
    differs = differing(settings_of("optimizer.eps=1e-6"))
    assert differs["optimizer.eps"] == 1e-6
    assert differs["optimizer.density.kind"] == "linear"
    assert "optimizer.density.start" not in differs, "0.25 is LinearDecay's default"
    assert differs["optimizer.interval.start"] == 25
    assert "optimizer.betas" not in differs
    assert not any(name.startswith(("trainer.device", "tracking", "run_root", "arm")) for name in differs)


def test_what_is_left_out_exists_and_names_in_old_records_are_left_out(settings_of):
    settings = settings_of()
    parts = {"": settings, "task.": FinetuneSettings()}
    parts |= {f"{group}.": getattr(settings, group) for group in ("data", "model", "trainer", "optimizer")}
    gone = {"data.store"}  # which is in old records
    assert set(NOT_PART) - gone <= {f"{path}{f.name}" for path, part in parts.items() for f in fields(part)}
    theirs = {"seed": 1, "trainer.compile": True, "model.loss_chunk_rows": 2048, "optimizer.lr": 0.1}
    assert still_part(theirs) == {"seed": 1, "optimizer.lr": 0.1}
