"""What the processes of test_shards.py run: the same training on whole tensors and on shards of them.

Each prints one line of JSON. Losses are of 30 steps through refreshes, with a falling ρ and a moving T.
"""

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from adafrugal.optim import SVD, Frugal, LinearDecay, LossAware, UpdateInBackward
from adafrugal.optim.sharding.shards import as_sharded

DEVICE = sys.argv[1]
FEW = LinearDecay(0.3, 0.15, steps=25)  # directions that gradients of these batches tell apart
RIGHT = {"kind": "svd", "side": "right"}
ARMS = {
    "blocks": {},
    "blocks, by elements": {"subspace": {"kind": "blocks", "match": "elements", "order": "random"}},
    "columns": {"subspace": "columns"},
    "columns, overlap kept": {"subspace": "columns", "on_refresh": "keep_overlap"},
    "columns, state in bfloat16": {"subspace": "columns", "state_dtype": "bfloat16"},
    "lion and sgd": {"subspace": "columns", "state_full": "lion", "state_free": "sgd"},
    "signsgd": {"density": 0},
    "slab": {"subspace": "slab"},
    "slab, kept": {"subspace": "slab", "on_refresh": "keep"},
    "slab, overlap kept": {"subspace": "slab", "on_refresh": "keep_overlap"},
    "slab, state in bfloat16": {"subspace": "slab", "state_dtype": "bfloat16"},
    "svd": {"subspace": RIGHT, "density": FEW, "state_free": "sgd"},
    "svd, kept": {"subspace": RIGHT, "density": FEW, "state_free": "none", "on_refresh": "keep"},
    "svd, randomized": {"subspace": {**RIGHT, "svd_method": "randomized"}, "density": FEW, "state_free": "sgd"},
    "random": {"subspace": {"kind": "random", "side": "right"}},
}
REFUSED = {kind: kind for kind in ("rows", "randk", "randperm", "svd", "random")}
REFUSED["svd, left"] = {"kind": "svd", "side": "left"}

RESUMED = ("blocks", "columns, overlap kept", "slab", "slab, overlap kept", "svd, kept")


class Model(nn.Module):
    """Rows that two processes cannot halve (21, 13), and a matrix of one row, of which the second has nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 13, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(13, 1, bias=False)
        self.to(DEVICE)

    def forward(self, hidden):
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden + self.head(hidden)  # of many numbers, or all gradients would have one direction

    def optimizer(self, arm, **settings):
        if arm == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        named = list(self.named_parameters())
        split = [(n, p) for n, p in named if p.ndim == 2]
        moving = {"density": LinearDecay(0.6, 0.2, steps=25), "interval": LossAware(3, 9, threshold=0.5, every=1)}
        others = [(n, p) for n, p in named if p.ndim < 2]
        groups = [{"params": split, "split": True}, {"params": others}]
        return Frugal(groups, lr=0.01, **{**moving, **ARMS[arm], **settings})


class Training:
    """Steps of a model on its process's part of the batches; where `late`, the head has no gradient at first."""

    def __init__(self, arm, mesh=None, in_backward=False, late=False, **settings):
        self.model, self.mesh, self.late = Model(), mesh, late
        self.losses, self.choices, self.spoke, self.refreshed = [], hashlib.sha256(), [], set()
        for part in (*self.model.blocks, self.model) if mesh and in_backward else (self.model,) if mesh else ():
            fully_shard(part, mesh=mesh)
        self.optimizer = self.model.optimizer(arm, **settings)
        if in_backward:
            UpdateInBackward(self.optimizer)
        if isinstance(self.optimizer, Frugal):
            self.optimizer.register_refresh_hook(lambda event: self.refreshed.add((event.event, event.step)))

    def go(self, steps):
        for step in steps:
            loss = self.backward(step)
            with CommDebugMode() if self.mesh else nullcontext() as said:
                self.optimizer.step()
            self.spoke += [step + 1] * bool(said and said.get_total_counts())
            self.optimizer.zero_grad()
            self.losses.append(loss)
            if isinstance(self.optimizer, Frugal):
                if step % 5 == 4:
                    self.optimizer.observe(round(loss, 3))
                self.choices.update(self.optimizer.checksum().encode())
        return self

    def backward(self, step):
        batch = torch.randn(8, 13, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        mine = batch.chunk(dist.get_world_size())[dist.get_rank()] if self.mesh else batch
        loss = (self.model(mine) - mine.sum(1, keepdim=True) - mine.flip(1)).square().mean()
        loss.backward()
        if self.late and step < 2:
            self.model.head.weight.grad = None
        loss = loss.detach().clone()
        if self.mesh:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss.item()

    def state_bytes(self):
        if isinstance(self.optimizer, Frugal):
            return self.optimizer.state_bytes().by_role()
        values = [v for state in self.optimizer.state.values() for v in state.values() if v.ndim]
        return {"moments": sum(v.to_local().nbytes if self.mesh else v.nbytes for v in values)}

    def moments(self):
        """All moments, whole, as `state_dict` gives them."""
        state = sorted(self.optimizer.state_dict()["state"].items())
        found = [value for _, entry in state for key, value in sorted(entry.items()) if "exp_avg" in key]
        return [whole(value) for value in found]

    def load(self, other):
        """Take weights and state from another training, whole or sharded."""
        with torch.no_grad():
            for param, given in zip(self.model.parameters(), other.model.parameters(), strict=True):
                param.copy_(as_sharded(whole(given), param) if self.mesh else whole(given))
        self.optimizer.load_state_dict(other.optimizer.state_dict())
        return self


def whole(value):
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()


def apart(one, other):
    """The largest difference between the weights of two trainings."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((whole(a) - whole(b)).abs().max()) for a, b in pairs)


@cache
def on_one(arm, late):
    return Training(arm, late=late).go(range(30))


def compared(arm, mesh, **how):
    together = on_one(arm, how.get("late", False))
    parts = Training(arm, mesh, **how).go(range(30))
    pairs = zip(together.losses, parts.losses, strict=True)
    moments = zip(together.moments(), parts.moments(), strict=True)
    return {
        "error": max(abs(a - b) / abs(a) for a, b in pairs),
        "moments": max((float((a - b).abs().max()) for a, b in moments if a.numel()), default=0.0),
        "choices": parts.choices.hexdigest(), "as one process": together.choices.hexdigest(),
        "spoke": parts.spoke, "refreshed": sorted({s for e, s in parts.refreshed if e != "shrink"}),
        "events": sorted(parts.refreshed) == sorted(together.refreshed), "late": ("continued", 3) in parts.refreshed,
        "bytes": parts.state_bytes(), "of": together.state_bytes(),
        "interval": getattr(parts.optimizer, "interval", None),
    }  # fmt: skip


def resumed(arm, mesh):
    """How far a run on shards is from one that went on from its state; and runs on one process and on two likewise."""
    one = Training(arm, mesh).go(range(8))
    found = {}
    for name, of in (("on as many", mesh), ("on one", None)):
        found[name] = Training(arm, of).load(one)
    alone = Training(arm).go(range(8))
    found["from one"] = Training(arm, mesh).load(alone)
    for each in (one, alone, *found.values()):
        each.go(range(8, 16))
    return {name: apart(each, alone if name == "from one" else one) for name, each in found.items()}


def put_nan(training):
    """A gradient that is not finite in the last process's rows alone."""
    if dist.get_rank() == dist.get_world_size() - 1:
        training.model.blocks[1][2].weight.grad.to_local()[-1, 0] = float("nan")


def skipped(mesh, nonfinite):
    """What becomes of a step, and of the next, where one process has a gradient that is not finite."""
    training, said = Training("slab", mesh, nonfinite=nonfinite).go(range(2)), None
    training.backward(2)
    put_nan(training)
    before = [whole(param) for param in training.model.parameters()]
    try:
        training.optimizer.step()
    except FloatingPointError as error:
        said = str(error)
    changed = not all(torch.equal(a, whole(b)) for a, b in zip(before, training.model.parameters(), strict=True))
    training.optimizer.zero_grad()
    training.go(range(3, 5))
    return {
        "said": said, "changed": changed, "skipped": training.optimizer.skipped_steps, "spoke": training.spoke,
        "checksum": training.optimizer.checksum(),
    }  # fmt: skip


def kept(mesh):
    """How many bases are kept at a refresh where one process has a gradient that is not finite."""
    training = Training("svd, kept", mesh, density=0.5, interval=1).go(range(2))
    training.backward(2)
    put_nan(training)
    training.optimizer.step()
    return {"kept": training.optimizer.param_groups[0]["bases_kept"], "checksum": training.optimizer.checksum()}


def owned(mesh):
    """How many bases this process finds at each of three refreshes, and how many there are to find."""
    counts, select = [0], SVD.select
    SVD.select = lambda *given: counts.append(counts.pop() + 1) or select(*given)
    try:
        training = Training("svd", mesh, interval=1, density=0.5)
        for step in range(3):
            training.go([step])
            counts.append(0)
    finally:
        SVD.select = select
    return {"found": counts[:3], "of": len(training.optimizer.param_groups[0]["params"])}


def heard(mesh):
    """Whether what counts words between processes hears one of each kind."""
    ones, group = torch.ones(2, device=DEVICE), mesh.get_group()
    pieces = list(torch.empty_like(ones).repeat(2).chunk(2)) if dist.get_rank() == 0 else None
    words = (
        partial(dist.all_reduce, ones), partial(dist.broadcast, ones, 0), partial(dist.gather, ones, pieces, 0),
        partial(dist.all_to_all_single, torch.empty_like(ones), ones, group=group),
    )  # fmt: skip
    counts = []
    for word in words:
        with CommDebugMode() as said:
            word()
        counts.append(said.get_total_counts())
    return counts


def refusal(kind, mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    try:
        Frugal([{"params": [model.head.weight], "split": True}], subspace=kind)
    except ValueError as error:
        return str(error)
    return None


def refused_state(mesh):
    """What is said of a state that has this process's part of a moment for the whole."""
    training = Training("slab", mesh).go(range(2))
    state = training.optimizer.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].to_local()
    try:
        training.optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return None


def as_shards_lie(mesh):
    """Whether a whole tensor lies as a parameter does, without a word."""
    model = Model()
    fully_shard(model, mesh=mesh)
    given = torch.arange(21 * 13.0).view(21, 13)
    with CommDebugMode() as said:
        lies = as_sharded(given, model.blocks[0][0].weight)
    alike = lies.placements == model.blocks[0][0].weight.placements
    kept = lies.to_local().untyped_storage().nbytes() == lies.to_local().nbytes
    return said.get_total_counts() == 0 and alike and kept and torch.equal(lies.full_tensor().cpu(), given)


def main():
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
    twofold = init_device_mesh(DEVICE, (1, mesh.size()), mesh_dim_names=("replicate", "shard"))
    found = {"rank": dist.get_rank()}
    found |= {arm: compared(arm, mesh) for arm in ("adamw", *ARMS) if arm != "svd, randomized"}
    for arm in ("columns", "svd"):
        found[f"{arm}, in the backward pass"] = compared(arm, mesh, in_backward=True)
    found["svd, on a mesh of two dimensions"] = compared("svd", twofold)
    found["svd, gradients that come late"] = compared("svd, randomized", mesh, late=True)
    found["resumed"] = {arm: resumed(arm, mesh) for arm in RESUMED}
    found["skipped"] = {nonfinite: skipped(mesh, nonfinite) for nonfinite in ("skip", "error")}
    found["kept"], found["owned"], found["heard"] = kept(mesh), owned(mesh), heard(mesh)
    found["refused"] = {name: refusal(kind, mesh) for name, kind in REFUSED.items()}
    found["refused state"], found["as shards lie"] = refused_state(mesh), as_shards_lie(mesh)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
