"""Every file of conf/optimizer builds its optimizer, which trains what it should."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from transformers import GPT2Config, GPT2LMHeadModel

from adafrugal.models import llama, optimizers
from adafrugal.optim import Frugal
from adafrugal.optim.normalizing import whitened
from adafrugal.settings.compose import check
from adafrugal.settings.schema import LlamaSettings

FILES = sorted(file.stem for file in (REPOSITORY / "conf" / "optimizer").glob("*.yaml") if file.stem != "lora")
TINY = LlamaSettings(
    vocabulary_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
)


@pytest.fixture
def built(composed):
    """A function: overrides -> a tiny model and the optimizer that the settings describe for it."""

    def make(*overrides, model=None):
        settings = check(*composed("trainer.steps=40", *overrides))
        torch.manual_seed(0)
        model = model or llama.build(TINY)
        return model, optimizers.build(settings, optimizers.groups(settings, model))

    return make


def backward(model, step):
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


def trained(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


@pytest.mark.parametrize("file", FILES)
def test_each_updates_every_tensor_it_should_and_has_the_parts_of_its_settings(file, built, settings_of):
    """tests/training/test_resume.py continues each from its saved state."""
    if file == "adamw_8bit":
        pytest.importorskip("torchao", reason="torchao is an extra")
    model, optimizer = built(f"optimizer={file}")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer, range(2))
    still = {name for name, p in model.named_parameters() if "layers" in name and torch.equal(p, before[name])}
    assert not still or (file == "badam" and all("layers.0" in n or "layers.1" in n or "layers.2" in n for n in still))
    if isinstance(optimizer, Frugal):
        o, group = settings_of(f"optimizer={file}").optimizer, next(g for g in optimizer.param_groups if g["split"])
        assert (group["density"].kind, group["interval"].kind) == (o.density["kind"], o.interval["kind"])
        assert group["subspace"].kind == (o.subspace if isinstance(o.subspace, str) else o.subspace["kind"])
        assert (group["state_full"], group["on_refresh"]) == (o.state_full, o.on_refresh)
        assert group["state_free"].kind == o.state_free
    else:
        assert file in ("adamw", "adamw_8bit", "adafactor", "muon", "scale", "apollo", "apollo_mini", "fira")


def test_galores_rates_and_badams_layers(built):
    split, other, *_ = built("optimizer=galore")[1].param_groups
    assert (split["lr"], split["split_lr_scale"], other["lr"]) == (0.01, 0.25, 0.01)
    model, badam = built("optimizer=badam")
    trained(model, badam, range(1))
    active = [n for n, p in model.named_parameters() if badam.state[p].get("entries")]
    assert len(active) == 7
    assert all("layers.3" in name for name in active)


def test_scale_has_embeddings_and_head_too_the_head_with_a_momentum(built):
    """Embeddings by columns, all else by rows; the blocks alone at their share of the rate; AdamW for vectors."""
    model, optimizer = built("optimizer=scale", "optimizer.split_lr_scale=0.5", "optimizer.lr=0.01")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer, range(1))
    moved = {name: (p.detach() - before[name]).square() for name, p in model.named_parameters()}
    rms = {name: square.mean(0 if "embed" in name else -1).sqrt() for name, square in moved.items() if square.ndim == 2}
    for name, lines in rms.items():
        expected = torch.full_like(lines, 0.005 if "layers" in name else 0.01)
        torch.testing.assert_close(lines, expected, rtol=1e-3, atol=0, msg=name)
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}
    assert kept.pop("lm_head.weight") == {"momentum_buffer"}
    assert kept == {name: {"step", "exp_avg", "exp_avg_sq"} for name, square in moved.items() if square.ndim == 1}


def test_scale_normalizes_by_output_unit_of_gpt2_too_and_its_tied_head_has_the_momentum(built):
    """Conv1D's weights are [n_in, n_out], so columns; of the matrix that is embedding and head rows."""
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=300, n_positions=32)
    model, optimizer = built("optimizer=scale", "optimizer.lr=0.01", model=GPT2LMHeadModel(config))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer, [0])
    moved = {name: (p.detach() - before[name]).square() for name, p in model.named_parameters() if p.ndim == 2}
    assert len(moved) == 10 and moved["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    for name, square in moved.items():
        lines = square.mean(-1 if "wte" in name else 0).sqrt()
        torch.testing.assert_close(lines, torch.full_like(lines, 0.01), rtol=1e-3, atol=0, msg=name)
    assert {name for name in moved if optimizer.state.get(model.get_parameter(name))} == {"transformer.wte.weight"}
    assert set(optimizer.state[model.transformer.wte.weight]) == {"momentum_buffer"}


def test_muon_moves_by_a_fifth_of_whiten(built):
    """docs/optimizer.md says so; torch's products are in bfloat16."""
    model, optimizer = built("optimizer=muon", "optimizer.lr=1", "optimizer.momentum=0", "optimizer.nesterov=false")
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    trained(model, optimizer, [0])
    expected = 0.2 * whitened(weight.grad, 5)
    assert (before - weight - expected).norm() < 0.05 * expected.norm()


def test_lion_is_lion_for_every_tensor_and_never_begins_anew(built):
    model, lion = built("optimizer=lion", "optimizer.interval=2")
    twin = copy.deepcopy(model)
    moments = [torch.zeros_like(p) for p in twin.parameters()]
    for step in range(6):
        trained(model, lion, [step])
        backward(twin, step)
        with torch.no_grad():
            for p, m in zip(twin.parameters(), moments, strict=True):
                p -= 1e-4 * torch.sign(0.9 * m + (1 - 0.9) * p.grad)
                m.mul_(0.99).add_(p.grad, alpha=1 - 0.99)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    apart = torch.cat([(p - q).detach().abs().flatten() for p, q in pairs])
    assert apart.max() <= 2.1e-4, "a sign of rounding noise may differ, once"
    assert apart.lt(1e-6).float().mean() > 0.999


def test_modules_are_treated_as_the_settings_say(built):
    where = {"head": "state_free", "embeddings": "frozen", "norms": "split"}
    model, optimizer = built("optimizer=frugal", *(f"optimizer.modules.{name}={how}" for name, how in where.items()))
    trained(model, optimizer, range(2))
    assert not optimizer.state[model.lm_head.weight].get("entries")
    assert not model.model.embed_tokens.weight.requires_grad
    assert any(p is model.model.norm.weight for g in optimizer.param_groups if g["split"] for p in g["params"])


def test_a_density_by_module_keeps_as_many_bytes_of_llama(built):
    shape = replace(TINY, hidden_size=192, intermediate_size=512, num_hidden_layers=1)
    found = []
    for arm in ("columns_50", "by_module"):
        model, optimizer = built(f"experiments=modules/{arm}", "scale=mini", model=llama.build(shape))
        trained(model, optimizer, range(1))
        block = model.model.layers[0]
        modules = block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj
        columns = [optimizer.state[module.weight]["exp_avg"].shape[1] for module in modules]
        found.append((columns, optimizer.state_bytes().total, optimizer.density))
    assert found == [([48, 48, 128], found[0][1], 0.25), ([12, 48, 200], found[0][1], 0.25)]


def test_adamw_at_a_share_of_the_rate_is_frugal_that_selects_all(built):
    scaled = ["optimizer.split_lr_scale=0.25", "optimizer.weight_decay=0.1"]
    model, adamw = built("optimizer=adamw", *scaled)
    all_selected = ["optimizer.density=1", "optimizer.on_refresh=keep_overlap"]
    twin, frugal = built("optimizer=frugal", *scaled, *all_selected, model=copy.deepcopy(model))
    trained(model, adamw, range(5))
    trained(twin, frugal, range(5))
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("file", "state"), [
    ("muon", {"momentum_buffer"}),
    ("apollo", {"step", "exp_avg", "exp_avg_sq", "norm"}),
    ("apollo_mini", {"step", "exp_avg", "exp_avg_sq", "norm"}),
    ("fira", {"step", "exp_avg", "exp_avg_sq", "norm", "basis"}),
])  # fmt: skip
def test_baselines_have_the_split_matrices_at_their_share_of_the_rate_and_adamw_the_rest(file, state, built):
    """Weight decay, which the rate multiplies, is as without the share."""
    for scale in (1, 0.5):
        rates = [f"optimizer.split_lr_scale={scale}", "optimizer.lr=0.01", "optimizer.weight_decay=0.1"]
        model, optimizer = built(f"optimizer={file}", *rates)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.01 * (scale if group["split"] else 1))
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.001 if group["weight_decay"] else 0)
    assert any(group["split"] for group in optimizer.param_groups)
    trained(model, optimizer, range(1))
    assert set(optimizer.state[model.model.layers[0].mlp.up_proj.weight]) == state
    assert set(optimizer.state[model.lm_head.weight]) == {"step", "exp_avg", "exp_avg_sq"}
