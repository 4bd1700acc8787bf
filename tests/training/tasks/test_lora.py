"""LoRA's adapters, through peft, against the formula."""

import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("peft", reason="peft is an extra: pip install peft")

from adafrugal.models import encoder, optimizers
from adafrugal.settings.schema import EncoderSettings
from adafrugal.system.errors import SettingError


@pytest.fixture
def adapted(finetune_settings, tiny_encoder):
    """A function: overrides -> a model with adapters, and its settings."""

    def make(*overrides):
        settings, _ = finetune_settings("rte", "optimizer=lora", *overrides)
        torch.manual_seed(0)
        model, *_ = encoder.load(EncoderSettings(name=str(tiny_encoder)), 2)
        optimizers.adapt(settings, model)
        return model, settings

    return make


def test_query_and_value_get_adapters_and_the_head_trains_too(adapted):
    model, _ = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 2  # two blocks, two matrices, A and B
    assert trained - adapters == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_an_adapter_adds_alpha_over_rank_times_its_product(adapted):
    model, _ = adapted("optimizer.rank=4", "optimizer.alpha=6")
    query = model.bert.encoder.layer[0].attention.self.query
    a, b = query.lora_A.default.weight, query.lora_B.default.weight
    assert (a.shape, b.shape) == ((4, 32), (32, 4))
    assert not b.any()  # it begins as the pretrained model
    with torch.no_grad():
        b.normal_()
    x = torch.randn(3, 32)
    expected = query.base_layer(x) + 6 / 4 * linear(linear(x, a), b)
    torch.testing.assert_close(query(x), expected)


def test_adamw_decays_and_trains_what_is_left(adapted):
    model, settings = adapted("optimizer.lr=1e-2")
    groups = optimizers.groups(settings, model)
    optimizer = optimizers.build(settings, groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}
    assert [(row[0], row[2]) for row in groups.counts()] == [
        ("adapters", 8), ("other matrices", 2), ("vectors, scalars", 2), ("frozen", 37)
    ]  # fmt: skip
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_targets_that_name_nothing_are_refused(adapted):
    with pytest.raises(
        SettingError,
        match=r"optimizer.targets is \['quary'\]: .*not found.* Linear in its blocks: query, key, value, dense",
    ):
        adapted("optimizer.targets=[quary]")
