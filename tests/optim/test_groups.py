import pytest
import torch
from torch import nn

from adafrugal.optim import Frugal, split_parameters


class Model(nn.Module):
    """A scalar, a tied head, a convolution, biases, a Linear outside the blocks, eleven blocks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(11))
        self.convolution = nn.Conv1d(4, 4, 3)
        self.pooler = nn.Linear(4, 4)
        self.layers_norm = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.ones(()))


def names(groups, rule):
    return [name for group in groups if group["rule"] == rule for name, _ in group["params"]]


def test_only_linear_weights_inside_blocks_are_split():
    groups = split_parameters(Model())
    assert names(groups, "Linear in blocks") == [f"layers.{i}.1.weight" for i in range(11)]
    others = ["embedding.weight", "convolution.weight", "pooler.weight", "layers_norm.weight"]
    assert names(groups, "other matrices") == others
    assert {"temperature", "pooler.bias", "layers.10.1.bias"} <= set(names(groups, "vectors, scalars"))


def test_every_trainable_tensor_is_in_one_group_and_frozen_ones_in_none():
    model = Model()
    model.layers[3].requires_grad_(False)
    found = [p for group in split_parameters(model) for _, p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == len({id(p) for p in found})


def test_tensors_of_fewer_than_two_dimensions_are_never_decayed():
    for group in split_parameters(Model()):
        undecayed = group.get("weight_decay") == 0
        assert all((p.ndim < 2) is undecayed for _, p in group["params"])


def test_a_linear_in_a_block_that_is_tied_to_something_outside_is_not_split():
    model = Model()
    model.layers[0][1].weight = model.pooler.weight
    assert "layers.0.1.weight" not in names(split_parameters(model), "Linear in blocks")


def test_a_model_with_nothing_to_split_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"nothing to split in Linear.*Make the groups yourself"):
        split_parameters(nn.Linear(3, 3))


def test_the_table_counts_tensors_parameters_and_bytes():
    model = Model()
    table = str(split_parameters(model)).splitlines()
    total = sum(p.numel() for p in model.parameters())
    assert table[1].split() == ["Linear", "in", "blocks", "split", "11", "176", "1,408"]
    assert table[-1].split() == ["all", str(len(list(model.parameters()))), str(total), f"{8 * total:,}"]


def test_groups_serve_more_than_one_frugal_can_be_changed_and_still_print():
    groups = split_parameters(Model())
    before = str(groups)
    for group in groups:
        group["lr"] = 7.0
    first, second = Frugal(groups), Frugal(groups)
    assert str(groups) == before
    assert [g["lr"] for g in first.param_groups] == [7.0, 7.0, 7.0]
    assert first.param_groups[0]["param_names"] == second.param_groups[0]["param_names"]


def test_torchs_optimizers_take_them_too():
    groups = split_parameters(Model())
    before = str(groups)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert str(groups) == before
