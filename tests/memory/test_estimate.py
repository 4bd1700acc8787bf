"""What is foretold of a run, against the tensors and the allocations of a real one."""

import pytest
import torch
from conftest import script

from adafrugal.memory import __main__ as command
from adafrugal.memory import breakdown, fit
from adafrugal.memory.estimate import estimate
from adafrugal.optim import Constant, state_bytes
from adafrugal.optim.choices import SUBSPACES
from adafrugal.settings.compose import check
from adafrugal.system.errors import SettingError

ARMS = {
    **{name: [f"optimizer={name}"] for name in (
        "adamw", "adafactor", "muon", "lion", "signsgd", "galore", "frugal", "adafrugal", "adagalore",
        "adafrugal_density", "adafrugal_interval",
    )},
    "badam": ["optimizer=badam", "optimizer.density=0.5"],
    **{f"frugal, {s}": ["optimizer=frugal", f"optimizer.subspace={s}", "optimizer.density=0.3"] for s in SUBSPACES},
    **{f"adafrugal, {s}": [f"optimizer.subspace={s}"] for s in SUBSPACES},
    "state in bf16": ["optimizer=frugal", "optimizer.state_dtype=bfloat16", "optimizer.stochastic_rounding=true"],
    "svd at random": ["optimizer=frugal", "optimizer.subspace={kind:svd,svd_method:randomized}"],
    "head split": ["optimizer=frugal", "optimizer.modules.head=split", "optimizer.subspace=columns"],
}  # fmt: skip


def after_a_step(settings):
    """The optimizer of a real run that has made its first step, with gradients for more."""
    real = script("memory").Real(settings)
    real.step()
    for param in real.model.parameters():
        param.grad = torch.zeros_like(param)
    return real.optimizer


def largest(optimizer, density):
    """Bytes of state in the turn that keeps most, of more turns than a cycle has."""
    split = [group for group in optimizer.param_groups if group.get("density", Constant(0)) != Constant(0)]
    for group in split if density is not None else ():
        group["density"], group["interval"], group["stagger"] = Constant(density), Constant(1), 1
    found = []
    for _ in range(40):
        optimizer.step()
        found.append(state_bytes(optimizer).total)
    return max(found)


@pytest.mark.parametrize("arm", ARMS)
def test_state_bytes_are_those_of_the_tensors(arm, settings):
    """After the first step, and in the turn of each density that keeps most."""
    chosen, _ = settings(*ARMS[arm])
    foretold, optimizer = estimate(chosen), after_a_step(chosen)
    assert foretold.first_state == state_bytes(optimizer).total
    assert len(foretold.stages) == (2 if "linear" in str(getattr(chosen.optimizer, "density", "")) else 1)
    for stage in foretold.stages:
        assert stage.state_bytes == largest(optimizer, stage.density)


@pytest.mark.parametrize("match", ["count", "elements"])
def test_blocks_in_a_random_order_are_drawn_as_they_are_in_a_run(match, settings):
    chosen, _ = settings("optimizer=frugal", f"optimizer.subspace={{kind:blocks,order:random,match:{match}}}")
    assert estimate(chosen).first_state == state_bytes(after_a_step(chosen)).total


MEASURED = [
    [
        "model=llama_tiny",
        "optimizer=adafrugal",
        "trainer.batch_size=1",
        "trainer.sequence_length=8",
    ],  # in the optimizer
    ["model=llama_9m", "optimizer=adafrugal"],
    ["model=llama_9m", "optimizer=adamw", "trainer.precision=bf16", "trainer.micro_batch_size=4"],
    ["model=llama_9m", "optimizer=galore", "model.loss_chunk_rows=128", "trainer.sequence_length=64"],
]


@pytest.mark.parametrize("words", MEASURED)
def test_the_peak_is_within_a_twentieth_of_what_a_run_allocates(words, composed):
    chosen = check(*composed("trainer.sequence_length=64", "trainer.precision=fp32", *words))
    foretold = estimate(chosen).peak.total
    measured = script("memory").allocated_at_most(chosen)
    assert foretold == pytest.approx(measured, rel=0.05)


ALL_CUTS = [
    "model.dtype=bfloat16", "trainer.precision=bf16", "optimizer.state_dtype=bfloat16",
    "optimizer.stochastic_rounding=true", "trainer.update_in_backward=true",
    "trainer.activation_checkpointing=layers", "model.loss_chunk_rows=128",
]  # fmt: skip
FEW = ["trainer.batch_size=1", "trainer.sequence_length=8"]


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer=adafrugal", *FEW, "trainer.update_in_backward=true"],
        ["optimizer=adamw", *FEW, "trainer.update_in_backward=true"],
        ["optimizer=galore", *FEW, "trainer.update_in_backward=true"],
        ["optimizer=adafrugal", "trainer.activation_checkpointing=layers"],
        ["optimizer=adafrugal", "trainer.activation_checkpointing=selective", "trainer.precision=bf16"],
        ["optimizer=adafrugal", *FEW, *ALL_CUTS[:4]],
        ["optimizer=adafrugal", *ALL_CUTS],
    ],
    ids=" ".join,
)
def test_so_it_is_with_what_lowers_it(words, composed):
    chosen = check(*composed("model=llama_9m", "trainer.sequence_length=64", *words))
    assert estimate(chosen).peak.total == pytest.approx(script("memory").allocated_at_most(chosen), rel=0.05)


@pytest.mark.parametrize("arm", ["adafrugal", "frugal", "galore"])
def test_updates_in_the_backward_pass_save_the_gradients_where_the_optimizer_sets_the_peak(arm, settings):
    """All but the one at hand, and what the backward pass has beside it."""
    words = [f"optimizer={arm}", "model.hidden_size=256", "model.intermediate_size=688", "model.num_hidden_layers=8"]
    plain = estimate(settings(*words, *FEW)[0]).peak
    cut = estimate(settings(*words, *FEW, "trainer.update_in_backward=true")[0]).peak
    assert plain.phase == "optimizer"
    assert 0.92 * plain.gradients < plain.total - cut.total <= plain.gradients


def test_activations_that_are_made_again_are_not_kept(settings):
    kept = [
        estimate(settings(f"trainer.activation_checkpointing={which}", "model.num_hidden_layers=6")[0]).peak.activations
        for which in ("none", "selective", "layers")
    ]
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]


@pytest.mark.gpu
@pytest.mark.parametrize("words", [*MEASURED[1:3], ["model=llama_60m", "optimizer=adafrugal", *ALL_CUTS]], ids=" ".join)
def test_on_a_gpu_the_peak_is_near_too(words, composed):
    """Allocated, not reserved; a GPU's kernels are others than those that are traced."""
    chosen = check(*composed("trainer.sequence_length=256", "trainer.precision=bf16", *words))
    tiny = [
        "model=llama_tiny",
        "trainer.sequence_length=8",
        "trainer.precision=bf16",
        "data.tokenizer.vocabulary_size=512",
    ]
    script("memory").Real(check(*composed(*tiny)), "cuda").step()  # cuBLAS keeps workspaces from its first call on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    real = script("memory").Real(chosen, "cuda")
    for _ in range(2):
        real.step()
    measured = torch.cuda.max_memory_allocated() - before
    assert estimate(chosen).peak.total == pytest.approx(measured, rel=0.05)


def test_the_command_says_it_and_what_fits(capsys):
    words = ["scale=smoke", "--fits", "0.02", "optimizer=adamw,adafrugal"]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "adamw  adafrugal, ρ 0.24  adafrugal, ρ 0.05" in out, "ρ has begun to fall"
    assert "adamw in 0.02 GiB:\n  the largest micro-batch is " in out
    assert "  the largest ρ is " in out


def test_what_fits_does_and_the_next_does_not(settings):
    chosen, _ = settings("optimizer=frugal", "model.loss_chunk_rows=null")
    peaks = {rows: fit._peak(chosen, micro_batch_size=rows).total for rows in (1, 2, 4, 8)}
    between = (peaks[2] + peaks[4]) / 2 / fit.GIB
    assert "the largest micro-batch is 2\n" in breakdown.what_fits(chosen, between)
    assert "not even a micro-batch of one row fits" in breakdown.what_fits(chosen, peaks[1] / 2 / fit.GIB)


def test_a_density_that_selects_nothing_is_no_answer(settings):
    chosen, _ = settings("optimizer=galore")
    assert "  no ρ fits with the micro-batch of 8 that is set\n" in breakdown.what_fits(chosen, 0.0001)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer=adamm"], "optimizer: there is no 'adamm'"),
        (["--fits", "-1", "scale=smoke"], "--fits is -1.0; allowed: a number of GiB above 0"),
        (
            ["scale=smoke", "optimizer=galore", "optimizer.density=0.001"],
            "optimizer: a density of 0.001 selects nothing",
        ),
        (["experiments=glue/rte"], "task is finetune; allowed: pretrain"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(words, line, capsys):
    assert command.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_a_part_of_a_model_is_not_estimated(settings):
    chosen, _ = settings("trainer.parallel=fsdp")
    with pytest.raises(SettingError, match=r"^trainer.parallel is fsdp; allowed: none or ddp, since"):
        estimate(chosen)
