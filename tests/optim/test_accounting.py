"""Bytes of state: of this optimizer, of torch's own, and in the papers' table."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import stepping
import torch
import yaml
from conftest import REPOSITORY

from adafrugal.models import llama
from adafrugal.optim import Columns, split_parameters, state_bytes
from adafrugal.optim.accounting import adamw_state_bytes
from adafrugal.optim.subspaces import subspace as as_subspace
from adafrugal.settings.schema import LlamaSettings

stepped = partial(stepping.stepped, steps=[0])


def matrices():
    return list(zip("ab", stepping.matrices([(4, 8), (2, 8)]), strict=True))


@dataclass(frozen=True)
class Scored(Columns):
    """Columns that remember a score each."""

    kind: ClassVar[str] = "own_scored"
    remembers: ClassVar[tuple[str, ...]] = ("indices", "scores")

    def select(self, param, grad, share, generator, old, place):
        chosen = super().select(param, grad, share, generator, old, place)
        return chosen | {"scores": torch.ones(len(chosen["indices"]))}


def test_what_a_subspace_of_ones_own_remembers_is_no_moment():
    counted = stepped(stepping.frugal(matrices(), density=0.5, subspace=Scored())).state_bytes()
    assert counted["a"] == {"counters": 4, "moments": 2 * 4 * (4 * 4), "indices": (8 + 4) * 4}


def test_frugal_by_parameter_and_role():
    counted = stepped(stepping.frugal(matrices(), density=0.5, subspace="columns")).state_bytes()
    assert counted["a"] == {"counters": 4, "moments": 2 * 4 * (4 * 4), "indices": 8 * 4}
    assert counted["b"] == {"counters": 4, "moments": 2 * 4 * (2 * 4), "indices": 8 * 4}
    assert counted.by_role() == {"counters": 8, "moments": 192, "indices": 64}
    assert counted.total == 264


def test_torchs_own_optimizers_with_and_without_names():
    adamw = stepped(torch.optim.AdamW([{"params": matrices()}]))
    assert state_bytes(adamw).by_role() == {"counters": 8, "moments": 2 * 4 * 48}
    sgd = stepped(torch.optim.SGD([p for _, p in matrices()], lr=1.0, momentum=0.9))
    assert state_bytes(sgd) == {"0": {"moments": 128}, "1": {"moments": 64}}
    assert state_bytes(torch.optim.SGD([p for _, p in matrices()], lr=1.0)).total == 0


def test_no_group_hides_another():
    sgd = torch.optim.SGD([{"params": [p]} for _, p in matrices()], lr=1.0, momentum=0.9)
    assert state_bytes(stepped(sgd)) == {"0": {"moments": 128}, "1": {"moments": 64}}
    same_names = [{"params": [("a", p)]} for _, p in matrices()]
    assert state_bytes(stepped(torch.optim.SGD(same_names, lr=1.0, momentum=0.9))).total == 192


def test_torchs_newer_optimizers_and_tensors_made_of_tensors():
    adafactor = stepped(torch.optim.Adafactor([{"params": matrices()}]))
    assert state_bytes(adafactor)["a"] == {"counters": 4, "moments": 4 * (4 + 8)}
    muon = stepped(torch.optim.Muon([{"params": matrices()}]))
    assert state_bytes(muon).by_role() == {"moments": 4 * 48}

    class Quantized(torch.Tensor):
        """Codes of a byte each, and scales, as torchao keeps moments in 8 bits."""

        @staticmethod
        def __new__(cls, codes, scales):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scales):
            self.codes, self.scales = codes, scales

        def __tensor_flatten__(self):
            return ["codes", "scales"], None

        @classmethod
        def __torch_dispatch__(cls, *_):
            raise NotImplementedError

    param = matrices()[0][1]
    state = {param: {"exp_avg": Quantized(torch.zeros(256, dtype=torch.uint8), torch.zeros(2))}}
    fake = SimpleNamespace(param_groups=[{"params": [param]}], state=state)
    assert state_bytes(fake) == {"0": {"moments": 256 + 8}}


def test_torchaos_8_bit_moments_where_it_is_installed():
    optim = pytest.importorskip("torchao.optim", reason="torchao is an extra")
    param = torch.nn.Parameter(torch.zeros(64, 256))
    adamw = stepped(optim.AdamW8bit([param], block_size=256))
    # a byte an entry and four a block of 256, for two moments, and their tables of 256 values
    assert 2 * 16384 < state_bytes(adamw)["0"]["moments"] < 2 * (16384 + 4 * 64 + 4 * 256) + 1


# -- the papers' table -----------------------------------------------------------------------------------------------

# FACTS of the papers §3, GiB of float32 state: {size: {ρ: all of it}}; with the basis of svd at ρ = 0.25
TABLE = {
    "60m": {1.0: 0.433, 0.25: 0.291, 0.05: 0.254, 0.0: 0.244, "svd": 0.305},
    "130m": {1.0: 0.999, 0.25: 0.525, 0.05: 0.398, 0.0: 0.366, "svd": 0.571},
    "350m": {1.0: 2.742, 0.25: 1.052, 0.05: 0.601, 0.0: 0.489, "svd": 1.216},
}


@pytest.mark.parametrize("size", TABLE)
def test_state_of_the_papers_models_is_that_of_the_derived_table(size):
    shape = yaml.safe_load((REPOSITORY / "conf" / "model" / f"llama_{size}.yaml").read_text())
    with torch.device("meta"):
        model = llama.build(LlamaSettings(**{k: v for k, v in shape.items() if k != "defaults"}))
    split, always = [], 0
    for group in split_parameters(model):
        if group["split"]:
            split += [param.shape for _, param in group["params"]]
        else:
            always += sum(param.numel() for _, param in group["params"])
    entries, svd = as_subspace("randk").entries, as_subspace("svd")
    found = {rho: 8 * (always + sum(entries(shape, rho) for shape in split)) for rho in (1.0, 0.25, 0.05, 0.0)}
    bases = sum(4 * svd.rank(shape, 0.25) * min(shape) for shape in split)
    found["svd"] = 8 * (always + sum(svd.entries(shape, 0.25) for shape in split)) + bases
    assert {key: count / 2**30 for key, count in found.items()} == pytest.approx(TABLE[size], abs=0.0005)


def test_adamws_state_is_what_adamw_keeps_with_frozen_tensors_counted():
    model = torch.nn.Linear(7, 5)
    optimizer = stepped(torch.optim.AdamW(model.parameters(), fused=True))
    model.bias.requires_grad_(False)
    assert adamw_state_bytes(model.parameters()) == state_bytes(optimizer).total
