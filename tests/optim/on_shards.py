"""What the processes of tests/optim/test_sharded.py run: the same training on whole tensors and on shards of them.

Each prints one line of JSON. Losses are of 30 steps through refreshes, with a falling ρ and a moving T.
"""

import hashlib
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from adafrugal.optim import Frugal, LinearDecay, LossAware, UpdateInBackward

ARMS = {
    "blocks": {},
    "blocks, by elements": {"subspace": {"kind": "blocks", "match": "elements", "order": "random"}},
    "columns": {"subspace": "columns"},
    "columns, overlap kept": {"subspace": "columns", "on_refresh": "keep_overlap"},
    "columns, state in bfloat16": {"subspace": "columns", "state_dtype": "bfloat16"},
    "lion and sgd": {"subspace": "columns", "state_full": "lion", "state_free": "sgd"},
    "signsgd": {"density": 0},
}
REFUSED = ("rows", "slab", "randk", "randperm", "svd", "random")


class Model(nn.Module):
    """Rows that two processes cannot halve (21, 13), and a matrix of one row, of which the second has nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 13, bias=False)) for _ in range(4)
        )
        self.head = nn.Linear(13, 1, bias=False)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def optimizer(self, arm):
        if arm == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        named = list(self.named_parameters())
        split = [(n, p) for n, p in named if p.ndim == 2]
        moving = {"density": LinearDecay(0.6, 0.2, steps=25), "interval": LossAware(3, 9, threshold=0.5, every=1)}
        others = [(n, p) for n, p in named if p.ndim < 2]
        return Frugal([{"params": split, "split": True}, {"params": others}], lr=0.01, **{**moving, **ARMS[arm]})


class Training:
    """Steps of a model on its process's part of the batches."""

    def __init__(self, arm, mesh=None, in_backward=False):
        self.model, self.mesh, self.losses, self.choices, self.silent = Model(), mesh, [], hashlib.sha256(), True
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
            with CommDebugMode() as said:
                self.optimizer.step()
            self.silent &= said.get_total_counts() == 0
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
        group = self.optimizer.param_groups[0]
        chosen = [self.optimizer.state[p].get("indices", torch.zeros(0)).tolist() for p in group["params"]]
        entries = [self.optimizer.state[p].get("entries") for p in group["params"]]
        self.choices.update(repr((chosen, entries, self.optimizer.density, self.optimizer.interval)).encode())

    def state_bytes(self):
        return sum(
            local.numel() * local.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.ndim
            for local in [value.to_local() if hasattr(value, "to_local") else value]
        )

    def moments(self):
        """All moments, whole, as `state_dict` gives them."""
        state = self.optimizer.state_dict()["state"]
        found = [value for entry in state.values() for key, value in sorted(entry.items()) if "exp_avg" in key]
        return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in found]


def compared(arm, mesh, in_backward=False):
    whole, parts = Training(arm).go(range(30)), Training(arm, mesh, in_backward).go(range(30))
    pairs = zip(whole.losses, parts.losses, strict=True)
    moments = [
        float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(whole.moments(), parts.moments(), strict=True)
    ]
    return {
        "error": max(abs(a - b) / abs(a) for a, b in pairs), "moments": max(moments, default=0.0),
        "choices": parts.choices.hexdigest(), "as one process": whole.choices.hexdigest(), "silent": parts.silent,
        "bytes": parts.state_bytes(), "of": whole.state_bytes(), "interval": getattr(parts.optimizer, "interval", None),
    }  # fmt: skip


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


def heard(mesh):
    """Whether what counts words between processes hears one."""
    with CommDebugMode() as said:
        dist.all_reduce(torch.ones(1, device=mesh.device_type))
    return said.get_total_counts()


def refusal(kind, mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    try:
        Frugal([{"params": [model.head.weight], "split": True}], subspace=kind)
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
    found["columns, in the backward pass"] = compared("columns", mesh, in_backward=True)
    found["resumed"] = {arm: resumed(arm, mesh) for arm in ("blocks", "columns")}
    found["heard"] = heard(mesh)
    found["refused"] = {kind: refusal(kind, mesh) for kind in REFUSED}
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
