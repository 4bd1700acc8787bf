from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY

from adafrugal.models import llama
from adafrugal.optim import Frugal, split_parameters, state_bytes
from adafrugal.optim.accounting import adamw_state_bytes
from adafrugal.optim.subspaces import subspace as as_subspace
from adafrugal.settings.schema import LlamaSettings


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def matrices():
    return [("a", torch.nn.Parameter(torch.zeros(4, 8))), ("b", torch.nn.Parameter(torch.zeros(2, 8)))]


def test_frugal_by_parameter_and_role():
    optimizer = stepped(Frugal([{"params": matrices(), "split": True}], density=0.5, subspace="columns"))
    counted = optimizer.state_bytes()
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
    "60m": {1.0: 0.433, 0.25: 0.291, 0.05: 0.254, 0.0: 0.244},
    "130m": {1.0: 0.999, 0.25: 0.525, 0.05: 0.398, 0.0: 0.366},
    "350m": {1.0: 2.742, 0.25: 1.052, 0.05: 0.601, 0.0: 0.489},
}
BY_ELEMENTS = {"kind": "blocks", "match": "elements"}
SVD = {"60m": 0.305, "130m": 0.571, "350m": 1.216}


@pytest.fixture(scope="module")
def groups():
    """The parameter groups of the papers' models, without memory."""
    found = {}
    for size in TABLE:
        shape = yaml.safe_load((REPOSITORY / "conf" / "model" / f"llama_{size}.yaml").read_text())
        with torch.device("meta"):
            model = llama.build(LlamaSettings(**{k: v for k, v in shape.items() if k != "defaults"}))
        found[size] = split_parameters(model)
    return found


def shapes(groups, split):
    return [param.shape for group in groups if group["split"] is split for _, param in group["params"]]


@pytest.mark.parametrize("size", TABLE)
@pytest.mark.parametrize("density", [1.0, 0.25, 0.05, 0.0])
def test_state_is_that_of_the_derived_table(groups, size, density):
    matrices, always = shapes(groups[size], True), sum(s.numel() for s in shapes(groups[size], False))
    exact = 8 * (always + density * sum(s.numel() for s in matrices))
    assert exact / 2**30 == pytest.approx(TABLE[size][density], abs=0.0005)
    counts = {
        "columns": sum(s[0] * int(density * s[1]) for s in matrices),
        "rows": sum(s[1] * int(density * s[0]) for s in matrices),
        "slab": sum(s[1] * int(density * s[0]) for s in matrices),
        "randk": sum(int(density * s.numel()) for s in matrices),
        "randperm": sum(max(s) * round(density * min(s)) for s in matrices),
        "random": sum(max(s) * round(density * min(s)) for s in matrices),
    }
    for kind, count in counts.items():
        assert sum(as_subspace(kind).entries(s, density) for s in matrices) == count


@pytest.mark.parametrize("density", [1.0, 0.25, 0.05])
@pytest.mark.parametrize(
    "kind", ["blocks", {"kind": "blocks", "match": "elements"}, "columns", "rows", "slab"], ids=str
)
def test_a_step_of_the_60m_model_keeps_what_the_subspace_counts(groups, kind, density):
    optimizer = Frugal(groups["60m"], density=density, subspace=kind, fused=False, compile=False)
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        param.grad = torch.empty_like(param)
    optimizer.step()
    always, matrices = sum(s.numel() for s in shapes(groups["60m"], False)), shapes(groups["60m"], True)
    found, sizes = optimizer.state_bytes().by_role()["moments"] / 8 - always, sorted(s.numel() for s in matrices)
    if kind == "blocks":
        count = round(density * len(matrices))
        assert sum(sizes[:count]) <= found <= sum(sizes[len(sizes) - count :])
    elif isinstance(kind, dict):
        assert abs(found - density * sum(sizes)) <= max(sizes)
    else:
        assert found == sum(as_subspace(kind).entries(s, density) for s in matrices)


@pytest.mark.parametrize("size", TABLE)
def test_svd_adds_its_basis(groups, size):
    svd, total = as_subspace("svd"), 8 * sum(s.numel() for s in shapes(groups[size], False))
    for shape in shapes(groups[size], True):
        total += 8 * svd.entries(shape, 0.25) + 4 * svd.rank(shape, 0.25) * min(shape)
    assert total / 2**30 == pytest.approx(SVD[size], abs=0.0005)


def test_adamws_state_is_what_adamw_keeps_with_frozen_tensors_counted():
    model = torch.nn.Linear(7, 5)
    optimizer = stepped(torch.optim.AdamW(model.parameters(), fused=True))
    model.bias.requires_grad_(False)
    assert adamw_state_bytes(model.parameters()) == state_bytes(optimizer).total
