"""What the processes of tests/optim/test_sharded.py run: the same training on whole tensors and on shards of them.

Each prints one line of JSON. Losses are of 30 steps through refreshes, with a falling ρ and a moving T.
"""

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from adafrugal.optim import Frugal, LinearDecay, LossAware, UpdateInBackward, sharded

ARMS = {
    "blocks": {},
    "blocks, by elements": {"subspace": {"kind": "blocks", "match": "elements", "order": "random"}},
    "columns": {"subspace": "columns"},
    "columns, overlap kept": {"subspace": "columns", "on_refresh": "keep_overlap"},
    "columns, state in bfloat16": {"subspace": "columns", "state_dtype": "bfloat16"},
    "lion and sgd": {"subspace": "columns", "state_full": "lion", "state_free": "sgd"},
    "signsgd": {"density": 0},
    "slab": {"subspace": "slab"},
    "slab, overlap kept": {"subspace": "slab", "on_refresh": "keep_overlap"},
    # fewer directions than a batch has rows: the others' singular values are those of rounding
    "svd": {"subspace": {"kind": "svd", "side": "right"}, "density": LinearDecay(0.3, 0.1, steps=25)},
    "svd, moments kept": {"subspace": {"kind": "svd", "side": "right"}, "density": LinearDecay(0.3, 0.1, steps=25),
                          "on_refresh": "keep", "state_free": "none"},
    "svd, randomized": {"subspace": {"kind": "svd", "side": "right", "svd_method": "randomized"},
                        "density": LinearDecay(0.3, 0.1, steps=25)},
    "random": {"subspace": {"kind": "random", "side": "right"}},
}
CROSSED = ("blocks", "columns", "columns, overlap kept", "slab", "slab, overlap kept", "svd")
REFUSED = {"rows": "rows", "randk": "randk", "randperm": "randperm", "svd": "svd", "random": "random",
           "left": {"kind": "svd", "side": "left"}, "kept": "slab"}  # fmt: skip


class Model(nn.Module):
    """Rows that two processes cannot halve (21, 13), and a matrix of one row, of which the second has nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 13, bias=False)) for _ in range(4)
        )
        self.wide = nn.Linear(13, 13, bias=False)  # gradients of the blocks have more directions than one
        self.head = nn.Linear(13, 1, bias=False)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden) + self.wide(hidden)

    def optimizer(self, arm):
        if arm == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        named = list(self.named_parameters())
        # all of a matrix of one row is in its basis, and what rounding leaves over would be updated by its sign
        least = 1 if arm.startswith("svd") else 0
        split = [(n, p) for n, p in named if p.ndim == 2 and len(p) > least]
        moving = {"density": LinearDecay(0.6, 0.2, steps=25), "interval": LossAware(3, 9, threshold=0.5, every=1)}
        others = [(n, p) for n, p in named if p.ndim < 2 or len(p) <= least]
        return Frugal([{"params": split, "split": True}, {"params": others}], lr=0.01, **{**moving, **ARMS[arm]})


class Training:
    """Steps of a model on its process's part of the batches."""

    def __init__(self, arm, mesh=None, in_backward=False):
        self.model, self.mesh, self.losses, self.choices, self.silent = Model(), mesh, [], hashlib.sha256(), True
        self.words_at_refreshes = 0
        for part in (*self.model.blocks, self.model) if mesh else ():
            fully_shard(part, mesh=mesh)
        self.optimizer = self.model.optimizer(arm)
        if in_backward:
            UpdateInBackward(self.optimizer)

    def go(self, steps):
        for step in steps:
            batch = torch.randn(8, 13, generator=torch.Generator().manual_seed(step), device="cpu")
            batch = batch.to(self.model.head.weight.device)
            mine = batch.chunk(self.mesh.size())[self.mesh.get_rank()] if self.mesh else batch
            loss = (self.model(mine) - mine.sum(1, keepdim=True)).square().mean()
            loss.backward()
            before = self.optimizer.param_groups[0].get("refreshes")
            with CommDebugMode() as said, listening() as heard:
                self.optimizer.step()
            words = said.get_total_counts() + len(heard)
            refreshed = self.optimizer.param_groups[0].get("refreshes") != before
            self.silent &= words == 0 or refreshed
            self.words_at_refreshes += words if refreshed else 0
            self.optimizer.zero_grad()
            loss = loss.detach().clone()
            if self.mesh:
                dist.all_reduce(loss)
                loss /= self.mesh.size()
            self.losses.append(loss.item())
            if isinstance(self.optimizer, Frugal):
                if step % 5 == 4:
                    self.optimizer.observe(round(loss.item(), 3))
                self._note()
        return self

    def _note(self):
        self.choices.update(self.optimizer.checksum().encode())

    def state_bytes(self, only=None):
        return sum(
            local.numel() * local.element_size()
            for state in self.optimizer.state.values()
            for name, value in state.items()
            if torch.is_tensor(value) and value.ndim and only in (None, name)
            for local in [value.to_local() if hasattr(value, "to_local") else value]
        )

    def moments(self):
        """All moments, whole, as `state_dict` gives them."""
        state = self.optimizer.state_dict()["state"]
        kept = [part for _, entry in sorted(state.items()) for part in sorted(entry.items())]
        found = [value for key, value in kept if "exp_avg" in key]
        return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in found]


@cache
def on_one(arm):
    """Thirty steps with whole tensors."""
    return Training(arm).go(range(30))


def compared(arm, mesh, in_backward=False):
    whole, parts = on_one(arm), Training(arm, mesh, in_backward).go(range(30))
    pairs = zip(whole.losses, parts.losses, strict=True)
    moments = [
        float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(whole.moments(), parts.moments(), strict=True)
    ]
    found = {
        "error": max(abs(a - b) / abs(a) for a, b in pairs),
        "moments": max(moments, default=0.0),
        "choices": parts.choices.hexdigest(),
        "as one process": whole.choices.hexdigest(),
        "silent": parts.silent,
        "words": parts.words_at_refreshes,
        "bytes": parts.state_bytes(),
        "bases": parts.state_bytes("basis"),
        "of": whole.state_bytes(),
    }
    return found | {"interval": getattr(parts.optimizer, "interval", None)}


def resumed(arm, mesh):
    """The largest difference between weights of a run and of one that went on from its state."""
    one = Training(arm, mesh).go(range(10))
    other = Training(arm, mesh)
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    for each in (one, other):
        each.go(range(10, 20))
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a.full_tensor() - b.full_tensor()).abs().max()) for a, b in pairs)


@contextmanager
def listening():
    """What the optimizer says to other processes in words of its own."""
    heard, real = [], {}

    def listened(name):
        return lambda *args, **kwargs: (heard.append(name), real[name](*args, **kwargs))[1]

    for name in ("all_reduce", "all_gather", "broadcast", "gather"):
        real[name] = getattr(dist, name)
        setattr(dist, name, listened(name))
    try:
        yield heard
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def heard(mesh):
    """Whether what counts words between processes hears one, of either kind."""
    with CommDebugMode() as said, listening() as own:
        dist.all_reduce(torch.ones(1, device=mesh.device_type))
    return said.get_total_counts() > 0 or len(own) > 0


def crossed(arm, mesh):
    """The largest difference to a whole run of one that changes sides after ten steps: whole to parts, and back."""
    found = []
    for first, second in ((None, mesh), (mesh, None)):
        one, other = Training(arm, first).go(range(10)), Training(arm, second)
        weights = {name: sharded.whole(value) for name, value in one.model.state_dict().items()}
        for name, param in other.model.named_parameters():
            param.data.copy_(sharded.as_sharded(weights[name], param) if second else weights[name])
        other.optimizer.load_state_dict(one.optimizer.state_dict())
        losses = one.losses + other.go(range(10, 20)).losses
        found.append(max(abs(a - b) / abs(a) for a, b in zip(on_one(arm).losses, losses, strict=False)))
    return max(found)


def poisoned(mesh, nonfinite):
    """What an optimizer makes of a gradient that is not finite on the last process alone."""
    training = Training("columns", mesh)
    training.optimizer.defaults["nonfinite"] = nonfinite
    training.model(torch.ones(2, 13)).sum().backward()
    grad = training.model.blocks[0][0].weight.grad.to_local()
    if dist.get_rank() == 1:
        grad[0, 0] = float("nan")
    try:
        training.optimizer.step()
    except FloatingPointError as error:
        return str(error)
    return training.optimizer.skipped_steps


def noise(mesh):
    """What is drawn for the same rows of a matrix of ones on each process, under stochastic rounding."""
    matrix = nn.Module()
    matrix.weight = nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16))
    fully_shard(matrix, mesh=mesh)
    optimizer = Frugal([{"params": [matrix.weight]}], lr=1e-3, stochastic_rounding=True)
    matrix.weight.grad = torch.ones_like(matrix.weight)
    optimizer.step()
    return matrix.weight.to_local().float().tolist()


def refusal(kind, mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    try:
        kept = {"on_refresh": "keep"} if kind == "slab" else {}
        Frugal([{"params": [model.head.weight], "split": True}], subspace=kind, **kept)
    except ValueError as error:
        return str(error)
    return None


def main():
    device = sys.argv[1]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    found = {"rank": dist.get_rank()}
    found |= {arm: compared(arm, mesh) for arm in ("adamw", *ARMS)}
    for arm in ("columns", "slab", "svd"):
        found[f"{arm}, in the backward pass"] = compared(arm, mesh, in_backward=True)
    found["resumed"] = {arm: resumed(arm, mesh) for arm in ("blocks", "columns", "slab, overlap kept", "svd")}
    found["crossed"] = {arm: crossed(arm, mesh) for arm in CROSSED}
    found["poisoned"] = {nonfinite: poisoned(mesh, nonfinite) for nonfinite in ("skip", "error")}
    found["noise"] = noise(mesh)
    found["heard"] = heard(mesh)
    found["refused"] = {name: refusal(kind, mesh) for name, kind in REFUSED.items()}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
