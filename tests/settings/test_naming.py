"""Names that tell the runs of a grid apart."""

import pytest

from adafrugal.settings.naming import name_run, run_name, shown

RUN = "runs/pretrain-embedded-llama_3m/adamw-0123456789"


@pytest.mark.parametrize(("words", "name"), [
    ("", "frugal seed=3"),
    ("optimizer=frugal optimizer.lr=1e-3 optimizer.state_free_lr_scale=0.5", "frugal lr=0.001 c=0.5 seed=3"),
    ("experiments=c4_60m/frugal scale=mini optimizer.density.end=0.1 seed=3", "frugal scale=mini ρ_end=0.1 seed=3"),
    ("experiments=glue/rte optimizer=frugal task.lr=2e-4", "frugal rte lr=0.0002 seed=3"),
    ("optimizer/density=constant +trainer.steps=9 data.seed=1", "frugal ρ=constant steps=9 data.seed=1 seed=3"),
    # what decides only where and how a run is made
    ("run_root=elsewhere tracking.mode=online checkpoint.every=7 trainer.device=cpu ~experiments", "frugal seed=3"),
    ("trainer.log_every=9 trainer.compile=false task.lr=3e-4", "frugal lr=0.0003 seed=3"),
    ("sweeps=density model=llama_9m data=c4", "frugal seed=3"),
    # this machine's directories
    (f"trainer.continue_from={RUN}/checkpoints/step-00000100", "frugal continue_from=adamw-0123456789/step-100 seed=3"),
    (f"model.weights=/a/{RUN} data.seed=1", "frugal weights=adamw-0123456789 data.seed=1 seed=3"),
    (f"trainer.continue_from={RUN}/checkpoints/", "frugal continue_from=adamw-0123456789 seed=3"),
    ("model.name=owner/model", "frugal name=owner/model seed=3"),
    ("data.source='/a/b/*.txt' data.tokenizer={kind:x,name:/c/d/}",
     "frugal source='*.txt' tokenizer={kind:x,name:d/} seed=3"),
    ("data.source=[/a/b/c.txt,texts/d.txt,https://e/f]", "frugal source=[c.txt,texts/d.txt,https://e/f] seed=3"),
])  # fmt: skip
def test_a_name_has_the_arm_what_was_typed_beside_its_defaults_and_the_seed(words, name):
    assert run_name("frugal", 3, words.split()) == name


@pytest.mark.parametrize(("settings", "text"), [
    ({"optimizer.lr": "1e-3"}, "lr=0.001"), ({"optimizer.lr": 0.001}, "lr=0.001"),  # as typed, and as composed
    ({"trainer.steps": "1000000", "optimizer.lr": 1.0}, "steps=1000000 lr=1"),
    ({"optimizer.density.kind": "constant", "optimizer.density.value": 0.25}, "ρ=0.25"),
    ({"optimizer/interval": "constant"}, "T=constant"),
    ({"optimizer.density.steps": None}, "K=all"), ({"trainer.clip_norm": None}, "clip_norm=null"),
    ({"optimizer.stochastic_rounding": True, "optimizer.subspace.kind": "blocks"},
     "stochastic_rounding=true subspace=blocks"),
])  # fmt: skip
def test_a_setting_has_one_spelling_wherever_it_is_shown(settings, text):
    assert shown(settings) == text


def test_a_name_is_cut_where_wandb_would_refuse_it():
    name = run_name("frugal", 3, [f"trainer.steps={'9' * 200}"])
    assert len(name) == 128
    assert name.endswith("9 seed=3"), "which tells it from the same of other seeds"


def test_a_run_keeps_the_name_that_it_is_given(settings):
    typed = ["optimizer=frugal", "optimizer.lr=0.01"]
    for name, found in (("null", "frugal lr=0.01 seed=0"), ("mine", "mine")):
        chosen, _ = settings(*typed, "tracking=wandb", f"tracking.name={name}")
        name_run(chosen, typed)
        assert chosen.tracking.name == found
    local, _ = settings(*typed)
    name_run(local, typed)
    assert vars(local.tracking) == {"kind": "local"}
