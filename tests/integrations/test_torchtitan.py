"""torchtitan is on no package index. What stands in for it makes the calls of its source (b5bcd76), in their order."""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from programs import PROGRAMS
from torch import nn

from adafrugal.optim import Frugal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer, dcp.stateful.Stateful):
    """Groups by the first pattern that finds a name; `fused` and `foreach` in each; states by flat names."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)
        implementation: str = "fused"

    @staticmethod
    def _resolve_optimizer_factory(name):
        return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]

    def __init__(self, config, *, model_parts):
        how = {"fused": config.implementation == "fused", "foreach": config.implementation == "foreach"}
        self.optimizers, claimed, everything = [], set(), []
        for model in model_parts:
            groups = defaultdict(list)
            for given in config.param_groups:
                found = {n: p for n, p in model.named_parameters() if n not in claimed and re.search(given.pattern, n)}
                claimed |= found.keys()
                everything += found.values()
                group = {"params": [*found.values()], "param_names": [*found], **how, **given.optimizer_kwargs}
                groups[given.optimizer_name].append(group)
            for name, members in groups.items():
                self.optimizers.append(self._resolve_optimizer_factory(name)(members))
        super().__init__(everything, {})

    def __iter__(self):
        return iter(self.optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        flat = {}
        for optimizer in self.optimizers:
            begin(optimizer)
            flat |= flattened(optimizer)
        return flat

    def load_state_dict(self, flat):
        for optimizer in self.optimizers:
            begin(optimizer)
            optimizer.load_state_dict(unflattened(optimizer, flat))


def begin(optimizer):
    """A step with zero gradients at lr 0, unless there is a state or a gradient."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if optimizer.state or any(param.grad is not None for param in params):
        return
    for param in params:
        param.grad = torch.zeros_like(param)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def flattened(optimizer):
    saved, flat = optimizer.state_dict(), {}
    for group in saved["param_groups"]:
        for number, name in zip(group["params"], group["param_names"], strict=True):
            assert not any(isinstance(value, dict) for value in saved["state"][number].values())
            flat |= {f"state.{name}.{key}": value for key, value in saved["state"][number].items()}
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            flat |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
    return flat


def unflattened(optimizer, flat):
    """The keys of the live state and groups, with the flat values; groups come without `param_names`."""
    state, groups, numbers = {}, [], iter(range(10**6))
    for group in optimizer.param_groups:
        names = group["param_names"]
        keys = [key for key in group if key not in ("params", "param_names")]
        groups.append({"params": [], **{key: flat[f"param_groups.{names[0]}.{key}"] for key in keys}})
        for name, param, number in zip(names, group["params"], numbers, strict=False):
            groups[-1]["params"].append(number)
            state[number] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[param]}
    return {"state": state, "param_groups": groups}


class CheckpointManager:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    def dcp_load(self, state_dict, checkpoint_id, from_hf, from_quantized):
        dcp.load(state_dict, checkpoint_id=checkpoint_id)


class MetricsProcessor:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    def log_validation(self, loss, step, extra_metrics=None):
        self.logged = (step, loss)


@pytest.fixture
def titan(monkeypatch):
    """The names of the program in docs/integrations.md, run with what stands in for torchtitan."""
    for name, found in {
        "torchtitan": {},
        "torchtitan.components": {},
        "torchtitan.components.checkpointer": {"OPTIMIZER": "optimizer", "CheckpointManager": CheckpointManager},
        "torchtitan.components.metrics": {"MetricsProcessor": MetricsProcessor},
        "torchtitan.components.optimizer": {c.__name__: c for c in (OptimizersContainer, ParamGroupConfig)},
    }.items():
        module = ModuleType(name)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)
    names = {"__name__": "titan"}
    monkeypatch.setitem(sys.modules, "titan", ModuleType("titan"))  # where dataclasses look for types
    exec(PROGRAMS["torchtitan"], names)
    return names


class Decoder(nn.Module):
    """Names as torchtitan's LLaMA has them; blocks are in a ModuleDict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(16, 8)
        self.layers = nn.ModuleDict()
        for number in range(4):
            parts = {"attention": nn.ModuleDict({"wo": nn.Linear(8, 8)}), "norm": nn.LayerNorm(8)}
            self.layers[str(number)] = nn.ModuleDict(parts | {"feed_forward": nn.ModuleDict({"w1": nn.Linear(8, 8)})})

    def forward(self, tokens):
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = hidden + layer["feed_forward"]["w1"](layer["attention"]["wo"](layer["norm"](hidden)).tanh())
        return hidden.square().mean()


def made(titan):
    model = Decoder()
    config = titan["adafrugal"](lr=0.01, steps=8)
    config.param_groups[0].optimizer_kwargs["interval"] |= {"start": 1, "max": 9, "threshold": 1e9, "every": 2}
    config.param_groups[0].optimizer_kwargs["density"]["start"] = 0.75
    optimizers, metrics = titan["Optimizers"](config, model_parts=[model]), titan["Metrics"]()
    metrics.optimizers = optimizers
    return model, optimizers, metrics


def train(model, optimizers, metrics, steps):
    for step in steps:
        model(torch.arange(16).roll(step)).backward()
        optimizers.step()
        optimizers.zero_grad()
        if step == 1 or step % 2 == 0:  # as the validator does
            metrics.log_validation(loss=5.0, step=step)


def test_patterns_split_the_matrices_of_blocks_and_only_due_losses_are_observed(titan):
    model, optimizers, metrics = made(titan)
    train(model, optimizers, metrics, range(1, 4))
    (optimizer,) = optimizers
    assert isinstance(optimizer, Frugal)
    split, others = optimizer.param_groups
    assert [*dict.fromkeys(name.partition(".")[0] for name in split["param_names"])] == ["layers"]
    assert len(split["params"]) == 8 and all(p.ndim == 2 for p in split["params"])
    assert len(others["params"]) == len([*model.parameters()]) - 8
    assert metrics.logged == (2, 5.0)
    assert optimizer.interval == 1, "one loss was observed, which is only remembered"


def test_a_checkpoint_continues_bit_for_bit_after_the_density_fell(titan, tmp_path):
    """Looking at a fresh optimizer's state for the first checkpoint changes nothing, either."""
    whole = made(titan)
    whole[1].state_dict()
    train(*whole, range(1, 6))
    dcp.save({"optimizer": whole[1], "model": whole[0].state_dict()}, checkpoint_id=tmp_path)
    other = made(titan)
    states = {"optimizer": other[1], "model": other[0].state_dict()}
    titan["Checkpoints"]().dcp_load(states, checkpoint_id=tmp_path, from_hf=False, from_quantized=False)
    other[0].load_state_dict(states["model"])
    ((a,), (b,)) = whole[1], other[1]
    assert b.density == a.density < 0.75
    for each in (whole, other):
        train(*each, range(6, 10))
    assert all(torch.equal(x, y) for x, y in zip(whole[0].parameters(), other[0].parameters(), strict=True))
    assert (a.checksum(), a.interval) == (b.checksum(), b.interval) and a.interval > 1
