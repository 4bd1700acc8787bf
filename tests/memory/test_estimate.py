"""Estimates, held against the tensors and the allocations of real steps."""

import pytest
import torch
from conftest import script
from torture import LONG

from adafrugal.memory import __main__ as command
from adafrugal.memory import estimate as module
from adafrugal.memory.estimate import estimate
from adafrugal.optim import Constant, state_bytes
from adafrugal.optim.choices import SUBSPACES
from adafrugal.settings.compose import check

FEW = ["trainer.batch_size=1", "trainer.sequence_length=8"]
ALL_CUTS = [
    "model.dtype=bfloat16", "trainer.precision=bf16", "optimizer.state_dtype=bfloat16",
    "optimizer.stochastic_rounding=true", "trainer.update_in_backward=true",
    "trainer.activation_checkpointing=layers", "model.loss_chunk_rows=128",
]  # fmt: skip
ONE_LAYER = "model.num_hidden_layers=1"
AWAY = "optimizer.state_on=cpu_always_full"
ARMS = {
    **{name: [f"optimizer={name}"] for name in ("adamw", "adafactor", "muon", "lion", "signsgd", "galore", "frugal")},
    **{name: [f"optimizer={name}", ONE_LAYER] for name in ("scale", "apollo", "apollo_mini", "fira")},
    "badam": ["optimizer=badam", "optimizer.density=0.5"],
    **{f"adafrugal, {s}": [f"optimizer.subspace={s}", ONE_LAYER] for s in SUBSPACES},
    "state in bf16": ["optimizer=frugal", *ALL_CUTS[2:4]],
    **{f"state in 8 bits, {s}": ["optimizer=frugal", f"optimizer.subspace={s}", "optimizer.state_dtype=int8", ONE_LAYER]
       for s in ("blocks", "columns")},
    "svd iterated": ["optimizer=frugal", "optimizer.subspace={kind:svd,svd_method:subspace_iteration}"],
    "density by module": ["optimizer=frugal", "optimizer.subspace=columns", ONE_LAYER,
                          "optimizer.modules.density_scale={*.up_proj:2}"],
    "head split": ["optimizer=frugal", "optimizer.modules.head=split", "optimizer.subspace=columns"],
}  # fmt: skip
if LONG:
    ARMS |= {arm: [f"optimizer={arm}"] for arm in ("adagalore", "adafrugal_density", "adafrugal_interval")}
    ARMS |= {
        f"frugal, {s}": ["optimizer=frugal", f"optimizer.subspace={s}", "optimizer.density=0.3"] for s in SUBSPACES
    }


def after_a_step(settings):
    """The optimizer of a real run that has made its first step, with gradients for more."""
    real = script("memory").Real(settings)
    real.step()
    for param in real.model.parameters():
        param.grad = torch.zeros_like(param)
    return real.optimizer


def largest(optimizer, density):
    """Bytes of state in the refresh period that keeps most, of more than a cycle has."""
    split = [group for group in optimizer.param_groups if group.get("density", Constant(0)) != Constant(0)]
    for group in split if density is not None else ():
        group["density"], group["interval"], group["stagger"] = Constant(density), Constant(1), 1
    found = []
    for _ in range(2 + 2 * max((len(group["params"]) for group in split), default=0)):
        optimizer.step()
        found.append(state_bytes(optimizer).total)
    return max(found)


@pytest.mark.parametrize("arm", ARMS)
def test_state_bytes_are_those_of_the_tensors(arm, settings):
    """After the first step, and at each density in the refresh period that keeps most."""
    chosen, _ = settings(*ARMS[arm])
    foretold, optimizer = estimate(chosen), after_a_step(chosen)
    assert foretold.first_state == state_bytes(optimizer).total
    assert len(foretold.stages) == (2 if "linear" in str(getattr(chosen.optimizer, "density", "")) else 1)
    for stage in foretold.stages:
        assert stage.peak.state == largest(optimizer, stage.density)


@pytest.mark.parametrize("match", ["count", "elements"])
def test_blocks_in_a_random_order_are_drawn_as_in_a_run(match, settings):
    chosen, _ = settings("optimizer=frugal", f"optimizer.subspace={{kind:blocks,order:random,match:{match}}}")
    assert estimate(chosen).first_state == state_bytes(after_a_step(chosen)).total


@pytest.mark.parametrize("arm", ["adamw", "galore", "adafrugal", "muon"])
@pytest.mark.parametrize("more", [(), ("trainer.micro_batch_size=2", "trainer.clip_norm=1"), tuple(FEW)])
def test_passes_traced_once_are_those_of_every_optimizer(arm, more, settings, monkeypatch):
    """But for positions that the passes leave alive in the optimizer's step, and the last loss."""
    chosen, _ = settings(f"optimizer={arm}", ONE_LAYER, *more)
    found = estimate(chosen)
    passes = module._passes

    def always_traced(built):
        with monkeypatch.context() as patched:
            patched.setattr(built.settings.trainer, "update_in_backward", True)  # of which no pass is repeated
            return passes(built)

    monkeypatch.setattr(module, "_passes", always_traced)
    traced = estimate(chosen)
    assert traced.first_state == found.first_state
    for one, other in zip(traced.stages, found.stages, strict=True):
        assert (one.state, one.peak.phase) == (other.state, other.peak.phase)
        assert one.peak.total == pytest.approx(other.peak.total, abs=8 * chosen.trainer.sequence_length + 8)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_few_slices_of_a_tensor_take_what_all_of_them_take(state_dtype, settings, monkeypatch):
    chosen, _ = settings(*ALL_CUTS, f"optimizer.state_dtype={state_dtype}", ONE_LAYER, *FEW)
    monkeypatch.setattr("adafrugal.optim.updates._IN_A_SLICE", 2**14)
    few = estimate(chosen)
    monkeypatch.setattr("adafrugal.optim.updates.FakeTensor", ())  # no tensor is one
    assert estimate(chosen) == few


@pytest.mark.parametrize("words", [(), ("optimizer.state_dtype=int8", "trainer.precision=bf16")])
def test_moments_in_the_cpus_memory_are_not_counted(words, settings):
    (here, _), (away, _) = (settings("optimizer=frugal", ONE_LAYER, *words, *more) for more in ((), (AWAY,)))
    ours, theirs = estimate(away), estimate(here)
    moments = theirs.stages[0].state["state-full", "moments"]
    assert ours.first_state == theirs.first_state
    assert ours.peak.total == theirs.peak.total - moments < theirs.peak.total


def test_first_gradients_are_counted(settings):
    chosen, _ = settings("optimizer=frugal_displacement", "optimizer.subspace=columns", ONE_LAYER)
    foretold, optimizer = estimate(chosen), after_a_step(chosen)
    assert foretold.first_state == foretold.peak.state == state_bytes(optimizer).total
    assert state_bytes(optimizer).by_role()["gradients"] == 2 * optimizer.selected_entries()


@pytest.mark.parametrize("words", [
    ["optimizer=adafrugal", *FEW],
    ["optimizer=adafrugal"],
    ["optimizer=adafrugal", "optimizer.state_free=swan", *FEW],
    ["optimizer=adamw", "trainer.precision=bf16", "trainer.micro_batch_size=4"],
    ["optimizer=galore", "model.loss_chunk_rows=128"],
    ["optimizer=frugal", *FEW, "trainer.update_in_backward=true"],
    ["optimizer=adamw", *FEW, "trainer.update_in_backward=true"],
    ["optimizer=galore", *FEW, "trainer.update_in_backward=true"],
    ["optimizer=fira", "optimizer.interval=1", *FEW],
    ["optimizer=frugal", "trainer.activation_checkpointing=layers"],
    ["optimizer=frugal", "trainer.activation_checkpointing=selective", "trainer.precision=bf16"],
    ["optimizer=frugal", *FEW, *ALL_CUTS[:4]],
    ["optimizer=frugal", *ALL_CUTS],
], ids=" ".join)  # fmt: skip
def test_the_peak_is_what_two_steps_allocate(words, settings):
    model = ["model=llama_9m", "data.tokenizer.vocabulary_size=512"] if LONG else []
    chosen, _ = settings("trainer.precision=fp32", *model, *words)
    assert estimate(chosen).peak.total == pytest.approx(script("memory").allocated_at_most(chosen), rel=0.02)


@pytest.mark.parametrize("arm", ["frugal", "galore"])
def test_updates_in_the_backward_pass_save_all_gradients_but_one(arm, settings):
    """Where the peak is in the optimizer; the backward pass has its own needs beside that gradient."""
    words = [f"optimizer={arm}", "model.hidden_size=256", "model.intermediate_size=688", "model.num_hidden_layers=8"]
    plain = estimate(settings(*words, *FEW)[0]).peak
    cut = estimate(settings(*words, *FEW, "trainer.update_in_backward=true")[0]).peak
    assert plain.phase == "optimizer"
    assert 0.92 * plain.gradients < plain.total - cut.total <= plain.gradients
    assert cut.gradients <= 4 * 256 * 688  # the largest matrix


def test_recomputed_activations_are_not_kept(settings):
    kept = [
        estimate(settings("optimizer=adamw", f"trainer.activation_checkpointing={which}")[0]).peak.activations
        for which in ("none", "selective", "layers")
    ]
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]


@pytest.mark.gpu
@pytest.mark.parametrize("words", [
    ["model=llama_9m", "optimizer=adafrugal"],
    ["model=llama_9m", "optimizer=adamw", "trainer.micro_batch_size=4"],
    ["model=llama_60m", "optimizer=adafrugal", *ALL_CUTS],
], ids=" ".join)  # fmt: skip
def test_on_a_gpu_the_peak_is_near_too(words, composed):
    """Allocated, not reserved; a GPU's kernels are others than those that are traced."""
    bf16 = ALL_CUTS[1]
    tiny = ["model=llama_tiny", "data.tokenizer.vocabulary_size=512", "trainer.sequence_length=8", bf16]
    chosen = check(*composed("trainer.sequence_length=256", bf16, *words))
    script("memory").Real(check(*composed(*tiny)), "cuda").step()  # cuBLAS keeps workspaces from its first call
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    real = script("memory").Real(chosen, "cuda")
    for _ in range(2):
        real.step()
    measured = torch.cuda.max_memory_allocated() - before
    assert estimate(chosen).peak.total == pytest.approx(measured, rel=0.05)


def test_the_command_prints_a_column_for_each_optimizer_and_density(capsys):
    assert command.main(["scale=smoke", "optimizer=adamw,adafrugal"]) == 0
    out = capsys.readouterr().out
    assert "adamw  adafrugal, ρ 0.24  adafrugal, ρ 0.05" in out, "ρ has begun to fall"
    assert "  moments of split tensors " in out


@pytest.mark.parametrize(("words", "line"), [
    (["optimizer=adamm"], "optimizer: there is no 'adamm'"),
    (["--fits", "-1", "scale=smoke"], "--fits is -1; allowed: GiB of tensors above 0"),
    (["scale=smoke", "optimizer=galore", "optimizer.density=0.001"], "optimizer: a density of 0.001 selects nothing"),
    (["task=finetune", "data=rte", "model=encoder", "model.name=/nowhere", "optimizer=adamw"],
     "model.name is /nowhere, which transformers cannot build: "),
    (["model=decoder", "model.name=/nowhere", "data.tokenizer.kind=pretrained", "data.tokenizer.name=/nowhere",
      "optimizer=frugal", "optimizer.fit_gib=1"], "model.name is /nowhere, which transformers cannot build: "),
    (["trainer.parallel=fsdp"], "trainer.parallel is 'fsdp'; allowed: none, or with a number of processes: python -m"),
    (["trainer.parallel=fsdp", "--processes", "3"], "--processes is 3; allowed: a divisor of trainer.batch_size (8)"),
    (["--processes", "2"], "--processes is 2 and trainer.parallel is none; allowed with several processes: "),
    (["trainer.parallel=fsdp", "trainer.offload=true", "--processes", "2"], "trainer.offload is true; allowed: false,"),
])  # fmt: skip
def test_what_cannot_be_estimated_is_one_line(words, line, capsys):
    assert command.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
