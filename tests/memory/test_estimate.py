"""What is foretold of a run, against the tensors and the allocations of a real one."""

import pytest
import torch
from conftest import script

from adafrugal.config import SUBSPACES
from adafrugal.memory import __main__ as command
from adafrugal.memory import fit, report
from adafrugal.memory.estimate import estimate
from adafrugal.optim import Constant, state_bytes

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
    from adafrugal import checks

    chosen = checks.check(*composed("trainer.sequence_length=64", "trainer.precision=fp32", *words))
    foretold = estimate(chosen).peak.total
    measured = script("memory").allocated_at_most(chosen)
    assert foretold == pytest.approx(measured, rel=0.05)


def test_the_command_says_it_and_what_fits(capsys):
    words = ["scale=smoke", "--fits", "0.02", "optimizer=adamw,adafrugal"]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert "adamw  adafrugal, ρ 0.24  adafrugal, ρ 0.05" in out, "ρ has begun to fall"
    assert "adamw in 0.02 GiB:\n  the largest micro-batch is " in out
    assert "  the largest ρ is " in out


def test_what_fits_does_and_the_next_does_not(settings):
    chosen, _ = settings("optimizer=frugal")
    peaks = {rows: fit._peak(chosen, micro_batch_size=rows).total for rows in (1, 2, 4, 8)}
    between = (peaks[2] + peaks[4]) / 2 / fit.GIB
    assert "the largest micro-batch is 2\n" in report.what_fits(chosen, between)
    assert "not even a micro-batch of one row fits" in report.what_fits(chosen, peaks[1] / 2 / fit.GIB)


def test_a_density_that_selects_nothing_is_no_answer(settings):
    chosen, _ = settings("optimizer=galore")
    assert "  no ρ fits with the micro-batch of 8 that is set\n" in report.what_fits(chosen, 0.0001)


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
