"""Two processes for test_shards.py: the same training on whole tensors and on shards of them.

`python on_shards.py DEVICE DIRECTORY` forks, and each process writes what it finds to RANK.json in the directory.
Losses are of 30 steps through refreshes, with a falling ρ and a moving T.
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from own_parts import ColumnNorm, MatrixNorm, RowNorm
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from adafrugal.optim import SVD, Displacement, Frugal, LinearDecay, LossAware, StateFree, UpdateInBackward, storage
from adafrugal.optim.sharding import shards
from adafrugal.optim.sharding.shards import as_sharded

DEVICE, PLACE, SIZE = sys.argv[1], Path(sys.argv[2]), 2
FEW = LinearDecay(0.3, 0.15, steps=25)  # directions that gradients of these batches tell apart
MOVED = Displacement(threshold=0.2, check=2, min=4, max=12)
RIGHT = {"kind": "svd", "side": "right"}
ARMS = {
    "blocks": {},
    "blocks, by elements": {"subspace": {"kind": "blocks", "match": "elements", "order": "random"}},
    "columns": {"subspace": "columns"},
    "columns, overlap kept": {"subspace": "columns", "on_refresh": "keep_overlap"},
    "lion and sgd": {"subspace": "columns", "state_full": "lion", "state_free": "sgd"},
    "row norm": {"subspace": "columns", "state_free": RowNorm()},
    "signsgd": {"density": 0},
    "slab": {"subspace": "slab"},
    "slab, kept": {"subspace": "slab", "on_refresh": "keep"},
    "slab, overlap kept": {"subspace": "slab", "on_refresh": "keep_overlap"},
    "slab, state in bfloat16": {"subspace": "slab", "state_dtype": "bfloat16"},
    "slab, by displacement": {"subspace": "slab", "interval": MOVED},
    "svd": {"subspace": RIGHT, "density": FEW, "state_free": "sgd"},
    "svd, kept": {"subspace": RIGHT, "density": FEW, "state_free": "none", "on_refresh": "keep"},
    "svd, iterated": {
        "subspace": {**RIGHT, "svd_method": "subspace_iteration", "rounds": 4},
        "density": FEW,
        "state_free": "sgd",
    },
    "random": {"subspace": {"kind": "random", "side": "right"}},
    "whiten, columns": {"subspace": "columns", "state_free": "whiten"},
    "swan, blocks": {"state_free": "swan"},
    "sinkhorn, slab": {"subspace": "slab", "state_free": "sinkhorn"},
    "colnorm, random": {"subspace": {"kind": "random", "side": "right"}, "state_free": "colnorm"},
    "own norm, columns": {"subspace": "columns", "state_free": MatrixNorm()},
    "own column norm, blocks": {"state_free": ColumnNorm()},
}
REFUSED = {kind: kind for kind in ("rows", "randk", "randperm", "svd", "random")}
REFUSED["svd, left"] = {"kind": "svd", "side": "left"}

RESUMED = ("blocks", "columns, overlap kept", "slab", "slab, overlap kept", "slab, by displacement", "svd, kept")


IN_8_BITS = ("blocks", "columns, overlap kept", "slab, kept")


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
        self.optimizer.register_refresh_hook(lambda event: self.refreshed.add((event.event, event.step)))

    def go(self, steps):
        for step in steps:
            loss = self.backward(step)
            with CommDebugMode() if self.mesh else nullcontext() as said:
                self.optimizer.step()
            self.spoke += [step + 1] * bool(said and said.get_total_counts())
            self.optimizer.zero_grad()
            self.losses.append(loss)
            if step % 5 == 4:
                self.optimizer.observe(round(loss, 3))
            self.choices.update(self.optimizer.checksum().encode())
        return self

    def backward(self, step):
        batch = torch.randn(8, 13, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        mine = batch.chunk(SIZE)[dist.get_rank()] if self.mesh else batch
        loss = (self.model(mine) - mine.sum(1, keepdim=True) - mine.flip(1)).square().mean()
        loss.backward()
        if self.late and step < 2:
            self.model.head.weight.grad = None
        loss = loss.detach().clone()
        if self.mesh:
            dist.all_reduce(loss)
            loss /= SIZE
        return loss.item()

    def moments(self):
        """All moments, whole, as `state_dict` gives them."""
        state = sorted(self.optimizer.state_dict()["state"].items())
        return [whole(value) for _, entry in state for key, value in sorted(entry.items()) if "exp_avg" in key]

    def load(self, other):
        """Take weights and state from another training, whole or sharded."""
        with torch.no_grad():
            for param, given in zip(self.model.parameters(), other.model.parameters(), strict=True):
                param.copy_(as_sharded(whole(given), param) if self.mesh else whole(given))
        self.optimizer.load_state_dict(other.optimizer.state_dict())
        return self


def whole(value):
    return shards.whole(value.detach())


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
        "bytes": parts.optimizer.state_bytes().by_role(), "of": together.optimizer.state_bytes().by_role(),
        "interval": parts.optimizer.interval,
    }  # fmt: skip


def resumed(arm, mesh, **settings):
    """How far a run on shards is from one that went on from its state; and runs on one process and on two likewise."""
    one = Training(arm, mesh, **settings).go(range(6))
    found = {}
    for name, of in (("on as many", mesh), ("on one", None)):
        found[name] = Training(arm, of, **settings).load(one)
    alone = Training(arm, **settings).go(range(6))
    found["from one"] = Training(arm, mesh, **settings).load(alone)
    for each in (one, alone, *found.values()):
        each.go(range(6, 12))
    return {name: apart(each, alone if name == "from one" else one) for name, each in found.items()}


def checkpointed(arm, mesh, **settings):
    """How far a run is, from one that goes on, that read its state as torch.distributed.checkpoint wrote it."""
    one, other = Training(arm, mesh, **settings), Training(arm, mesh, **settings)
    place = PLACE / f"{arm}{settings}"
    get_optimizer_state_dict(one.model, one.optimizer)  # before the first step, which changes nothing
    one.go(range(6))
    dcp.save({"optimizer": get_optimizer_state_dict(one.model, one.optimizer)}, checkpoint_id=place)
    reader = dcp.FileSystemReader(place)
    other.optimizer.prepare_for_load(reader.read_metadata().state_dict_metadata)
    state = {"optimizer": get_optimizer_state_dict(other.model, other.optimizer)}
    dcp.load(state, storage_reader=reader)
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    with torch.no_grad():
        for param, given in zip(other.model.parameters(), one.model.parameters(), strict=True):
            param.copy_(given)
    for each in (one, other):
        each.go(range(6, 12))
    return {"apart": apart(one, other), "from one": apart(one, Training(arm, mesh, **settings).go(range(12)))}


def put_nan(training):
    """A gradient that is not finite in the last process's rows alone."""
    if dist.get_rank() == SIZE - 1:
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


def directed(mesh, rule):
    """How many directions this process makes at a step, and which collectives it needs for all."""
    counts, call = [], StateFree.__call__
    StateFree.__call__ = lambda made_by, grad: counts.append(not made_by.by_entry) or call(made_by, grad)
    try:
        training = Training("signsgd", mesh, state_free=rule)
        training.backward(0)
        with CommDebugMode() as said:
            training.optimizer.step()
    finally:
        StateFree.__call__ = call
    return {"made": sum(counts), "collectives": {str(op): n for op, n in said.get_comm_counts().items()}}


def said_of(wrong):
    """Return what a function raises, as a string."""
    try:
        wrong()
    except ValueError as error:
        return str(error)
    return None


def refused_subspaces(mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    group = {"params": [model.head.weight], "split": True}
    return {name: said_of(partial(Frugal, [group], subspace=kind)) for name, kind in REFUSED.items()}


def refused_layout():
    """What rules say of a matrix that is sharded by columns."""
    mesh = init_device_mesh(DEVICE, (SIZE,))
    group = {"params": [nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]))], "split": True}
    return {rule: said_of(partial(Frugal, [group], density=0.0, state_free=rule)) for rule in ("rownorm", "whiten")}


def refused_state(mesh):
    """What is said of a state that has this process's part of a moment for the whole."""
    training = Training("slab", mesh).go(range(2))
    state = training.optimizer.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].to_local()
    return said_of(partial(training.optimizer.load_state_dict, state))


def as_shards_lie(mesh):
    """Whether a whole tensor lies as a parameter does, without communication."""
    model = Model()
    fully_shard(model, mesh=mesh)
    given, like = torch.arange(21 * 13.0).view(21, 13), model.blocks[0][0].weight
    with CommDebugMode() as said:
        lies = as_sharded(given, like)
    kept = lies.to_local().untyped_storage().nbytes() == lies.to_local().nbytes
    alike = said.get_total_counts() == 0 and lies.placements == like.placements
    return alike and kept and torch.equal(lies.full_tensor().cpu(), given)


def rounded(mesh, arm, state_dtype="bfloat16"):
    """Whether weights in bfloat16, rounded stochastically, are those of one process, of the same gradients."""
    ends = []
    for divided in (False, True):
        model = Model().bfloat16()
        if divided:
            fully_shard(model, mesh=mesh)
        optimizer = model.optimizer(arm, state_dtype=state_dtype, stochastic_rounding=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            for param in model.parameters():
                grad = torch.randn(param.shape, generator=generator).to(DEVICE, torch.bfloat16)
                param.grad = as_sharded(grad, param) if divided else grad
            optimizer.step()
        ends.append([whole(param) for param in model.parameters()])
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def run(rank):
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend, store = "nccl" if DEVICE == "cuda" else "gloo", f"file://{PLACE}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=SIZE)
    mesh = init_device_mesh(DEVICE, (SIZE,))
    twofold = init_device_mesh(DEVICE, (1, SIZE), mesh_dim_names=("replicate", "shard"))
    elsewhere = ("lion and sgd", "svd, iterated")
    found = {arm: compared(arm, mesh) for arm in ARMS if arm not in elsewhere}
    for arm in ("lion and sgd", "svd"):
        found[f"{arm}, in the backward pass"] = compared(arm, mesh, in_backward=True)
    found["whiten, columns, in the backward pass"] = compared("whiten, columns", mesh, in_backward=True)
    found["svd, on a mesh of two dimensions"] = compared("svd", twofold)
    found["swan, blocks, on a mesh of two dimensions"] = compared("swan, blocks", twofold)
    found["svd, gradients that come late"] = compared("svd, iterated", mesh, late=True)
    found["resumed"] = {arm: resumed(arm, mesh) for arm in RESUMED}
    found["checkpointed"] = {arm: checkpointed(arm, mesh) for arm in RESUMED}
    found["skipped"] = {nonfinite: skipped(mesh, nonfinite) for nonfinite in ("skip", "error")}
    found["kept"], found["owned"] = kept(mesh), owned(mesh)
    found["refused"], found["refused state"] = refused_subspaces(mesh), refused_state(mesh)
    found["refused layout"] = refused_layout()
    found["directed"] = {kind: directed(mesh, kind) for kind in ("whiten", "sinkhorn", "colnorm", "rownorm")}
    found["as shards lie"] = as_shards_lie(mesh)
    found["rounded"] = {arm: rounded(mesh, arm) for arm in ("blocks", "columns", "slab", "swan, blocks")}
    storage._FEWEST = 1  # small matrices take 8 bits, too
    found["in 8 bits"] = {
        arm: {
            "as one": rounded(mesh, arm, "int8"),
            "resumed": resumed(arm, mesh, state_dtype="int8")["on as many"],
            "checkpointed": checkpointed(arm, mesh, state_dtype="int8"),
        }
        for arm in IN_8_BITS
    }
    (PLACE / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    for arm in ARMS if DEVICE == "cpu" else ():
        on_one(arm, arm == "svd, iterated")  # once for both processes
    mp.start_processes(run, nprocs=SIZE, start_method="fork")
