"""The whole optimizer against a slow reference that is written here from the papers' formulas alone.

The reference keeps float64 lists, and a memory of its own for every entry that has state. It decides by itself when a
refresh is due and how much is to be selected; which entries those are, it reads from the optimizer's state.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from own_parts import RULES
from torch import nn

from adafrugal.optim import Frugal, LinearDecay, choices
from adafrugal.optim.choices import POLICIES
from adafrugal.optim.state_free import state_free

# -- the formulas, one number at a time ---------------------------------------------------------------------------


@dataclass
class Memory:
    """What a state-full rule knows of one number: Adam's m, v and t; Lion's m; the momentum buffer, in m too."""

    m: float = 0.0
    v: float = 0.0
    t: int = 0


def sign(x):
    return (x > 0) - (x < 0)


def adamw(memory, g, lr, betas, eps):
    beta1, beta2 = betas
    memory.t += 1
    memory.m = beta1 * memory.m + (1 - beta1) * g
    memory.v = beta2 * memory.v + (1 - beta2) * g * g
    corrected_m = memory.m / (1 - beta1**memory.t)
    corrected_v = memory.v / (1 - beta2**memory.t)
    return lr * corrected_m / (math.sqrt(corrected_v) + eps)


def lion(memory, g, lr, betas, eps):
    beta1, beta2 = betas
    change = lr * sign(beta1 * memory.m + (1 - beta1) * g)
    memory.m = beta2 * memory.m + (1 - beta2) * g
    return change


def sgdm(memory, g, lr, betas, eps):
    memory.m = betas[0] * memory.m + g
    return lr * memory.m


STATE_FULL = {"adamw": adamw, "lion": lion, "sgdm": sgdm}


def of_each_entry(rule):
    return lambda grad: [[rule(g) for g in row] for row in grad]


def mean_square(numbers):
    return sum(g * g for g in numbers) / len(numbers)


def transposed(matrix):
    return [list(line) for line in zip(*matrix, strict=True)]


def row_norm(grad, eps=0.0):
    return [[g / ((math.sqrt(mean_square(row)) or 1.0) + eps) for g in row] for row in grad]


def col_norm(grad, eps=0.0):
    return transposed(row_norm(transposed(grad), eps))


def matrix_norm(grad):
    root = math.sqrt(mean_square([g for row in grad for g in row]))
    return [[g / (root + 1e-8) for g in row] for row in grad]


def sinkhorn(grad):
    for _ in range(5):
        grad = col_norm(row_norm(grad))
    return grad


def whiten(grad):
    """By the singular values alone: Newton–Schulz keeps the vectors."""
    left, values, right = torch.linalg.svd(torch.tensor(grad, dtype=torch.float64), full_matrices=False)
    values /= values.norm() or 1.0
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values @ right * math.sqrt(max(len(grad), len(grad[0])))).tolist()


def centred(grad):
    return [[g - sum(row) / len(row) for g in row] for row in grad]


# kind -> the direction of a gradient, both lists of rows
BY_ENTRY = {"signsgd": of_each_entry(sign), "sgd": of_each_entry(lambda g: g), "none": of_each_entry(lambda g: 0.0)}
OF_MATRICES = {
    "whiten": whiten, "swan": lambda grad: whiten(row_norm(centred(grad))), "sinkhorn": sinkhorn, "rownorm": row_norm,
    "colnorm": col_norm,
}  # fmt: skip
OWN = {
    "own_cube": of_each_entry(lambda g: g**3), "own_rownorm": lambda grad: row_norm(grad, 1e-8),
    "own_norm": matrix_norm, "own_colnorm": lambda grad: col_norm(grad, 1e-8),
}  # fmt: skip
DIRECTIONS = BY_ENTRY | OF_MATRICES | OWN


class Reference:
    """One tensor. Entries (i, j) with a memory are state-full; with a basis they are entries of the projection.

    A unit is a list of entries that are selected together: a column, a row, a direction, a single entry, a matrix.
    """

    def __init__(self, weights, settings, split):
        self.weights = torch.atleast_2d(weights.detach()).tolist()
        self.settings, self.split = settings, split
        whole = [(i, j) for i, row in enumerate(self.weights) for j in range(len(row))]
        self.units = [] if split else [whole]
        self.memory = {} if split else {entry: Memory() for entry in whole}

    def choose(self, units, policy):
        old = self.memory
        self.memory = {entry: Memory() for unit in units for entry in unit}
        if policy == "keep":  # the first unit goes on with what the first had, and so on
            for before, now in zip(self.units, units, strict=False):
                self.memory |= {new: old[last] for last, new in zip(before, now, strict=True)}
        if policy == "keep_overlap":
            self.memory |= {entry: old[entry] for entry in self.memory if entry in old}
        self.units = units

    def step(self, grad, lr, basis=None, side=None):
        s, c = (self.settings["split_lr_scale"], self.settings["state_free_lr_scale"]) if self.split else (1.0, 1.0)
        kept = 1 - lr * self.settings["weight_decay"]
        self.weights = [[w * kept for w in row] for row in self.weights]
        if basis is not None:
            self._step_projected(grad, lr * s, lr * s * c, basis.double(), side)
            return
        grad = torch.atleast_2d(grad).tolist()
        free = self._free(grad) if self.split else grad
        for i, row in enumerate(grad):
            for j, g in enumerate(row):
                known = (i, j) in self.memory
                self.weights[i][j] -= self._full((i, j), g, lr * s) if known else lr * s * c * free[i][j]

    def _step_projected(self, grad, full_lr, free_lr, basis, side):
        onto = basis @ basis.T
        within = (lambda matrix: onto @ matrix) if side == "left" else (lambda matrix: matrix @ onto)
        compact = basis.T @ grad if side == "left" else grad @ basis
        if self.settings["state_free"].by_entry:
            free = self._free((grad - within(grad)).tolist())
        else:
            found = torch.tensor(self._free(grad.tolist()), dtype=torch.float64)
            free = (found - within(found)).tolist()
        change = torch.zeros_like(compact)
        for i, j in self.memory:
            change[i, j] = self._full((i, j), compact[i, j].item(), full_lr)
        back = (basis @ change if side == "left" else change @ basis.T).tolist()
        for i, row in enumerate(free):
            for j, g in enumerate(row):
                self.weights[i][j] -= back[i][j] + free_lr * g

    def _full(self, entry, g, lr):
        rule = STATE_FULL[self.settings["state_full"]]
        return rule(self.memory[entry], g, lr, self.settings["betas"], self.settings["eps"])

    def _free(self, grad):
        return DIRECTIONS[self.settings["state_free"].kind](grad)


# -- what is selected, and how much of it there has to be ---------------------------------------------------------


def side_of(shape, side):
    """The side of a matrix that is projected."""
    return side if side != "smaller" else "right" if shape[1] <= shape[0] else "left"


def units_in(state, kind, shape, side):
    """The units that the optimizer's state names, in order."""
    (n_out, n_in), rows, columns = shape, range(shape[0]), range(shape[1])
    if not state.get("entries"):
        return []
    if kind == "blocks":
        return [[(i, j) for i in rows for j in columns]]
    if kind == "randk":
        return [[divmod(k, n_in)] for k in state["indices"].tolist()]
    if kind == "slab":
        return [[(i, j) for j in columns] for i in range(state["start"], state["start"] + state["rows"])]
    lines = range(state["basis"].shape[1]) if "basis" in state else state["indices"].tolist()
    upright = {"columns": True, "rows": False, "randperm": n_in <= n_out}
    if upright[kind] if kind in upright else side_of(shape, side) == "right":
        return [[(i, k) for i in rows] for k in lines]
    return [[(k, j) for j in columns] for k in lines]


def how_many(kind, shape, density, side):
    """The number of units of one matrix."""
    n_out, n_in = shape
    d = {"left": n_out, "right": n_in, "smaller": min(shape)}[side]
    rank = min(round(density * d), min(shape))
    return {
        "columns": int(density * n_in), "rows": int(density * n_out), "slab": int(density * n_out),
        "randk": int(density * (n_out * n_in)),
    }.get(kind, rank)  # fmt: skip


def check_blocks(active, density, start, *, kind, order="descending", unit="matrix", match="count"):
    """`active` tells of every matrix whether it keeps state; `start` is how many blocks earlier turns have had."""
    blocks = [[i] for i in range(len(SHAPES))] if unit == "matrix" else LAYERS
    n, sizes = len(blocks), [sum(math.prod(SHAPES[i]) for i in block) for block in blocks]
    chosen = {b for b in range(n) if any(active[i] for i in blocks[b])}
    assert all(active[i] for b in chosen for i in blocks[b])
    count, target = round(density * n) if unit == "matrix" else int(density * n), density * sum(sizes)
    if order == "random":
        near = abs(sum(sizes[b] for b in chosen) - target) <= max(sizes) / 2
        assert near if match == "elements" else len(chosen) == count
        return
    upwards = list(range(n))
    inwards = list(itertools.chain(*zip(upwards[::-1], upwards, strict=True)))[:n]
    cycle = {"ascending": upwards, "descending": upwards[::-1], "mirror": inwards}[order]
    walk = [cycle[(start + k) % n] for k in range(n)]
    if match == "elements":
        count = min(range(n + 1), key=lambda m: abs(sum(sizes[b] for b in walk[:m]) - target))
    assert chosen == set(walk[:count])


def check_basis(basis, kind, side, grad):
    """Orthonormal, and the leading singular vectors of this step's gradient."""
    basis = basis.double()
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5)
    if kind == "svd":
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        leading = left[:, : basis.shape[1]] if side == "left" else right[: basis.shape[1]].T
        assert torch.allclose(basis @ basis.T, leading @ leading.T, atol=1e-4)


# -- the comparison -----------------------------------------------------------------------------------------------

SHAPES = [(5, 8), (8, 5), (4, 4), (1, 7), (7, 1), (7, 3), (3, 7), (5, 4)]
OTHERS = [(4, 3), (5,)]
STEPS, T = 24, 5
SETTINGS = {
    "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "split_lr_scale": 0.7, "state_free_lr_scale": 0.4,
    "subspace": "columns", "state_full": "adamw", "state_free": "signsgd", "on_refresh": "reset",
    "shrink": "immediately",
}  # fmt: skip
LAYERS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES + OTHERS]


class Comparison:
    """The optimizer and the reference side by side; `density` is a number or (start, end, steps) of a linear fall."""

    def __init__(self, density=0.3, fused=False, **settings):
        settings = SETTINGS | settings
        settings["state_free"] = state_free(settings["state_free"])
        subspace = settings["subspace"]
        self.described = dict(subspace) if isinstance(subspace, dict) else {"kind": subspace}
        self.kind, self.settings, self.fall = self.described["kind"], settings, density
        self.side = self.described.get("side", "smaller")
        self.params = [nn.Parameter(p) for p in tensors(seed=1)]
        self.references = [Reference(p, settings, split=i < len(SHAPES)) for i, p in enumerate(self.params)]
        layers = [number for number, places in enumerate(LAYERS) for _ in places]
        matrices, others = self.params[: len(SHAPES)], self.params[len(SHAPES) :]
        groups = [{"params": matrices, "split": True, "layers": layers}, {"params": others}]
        control = LinearDecay(density[0], density[1], steps=density[2]) if isinstance(density, tuple) else density
        self.optimizer = Frugal(groups, density=control, interval=T, fused=fused, compile=False, **settings)
        self.events, self.turns, self.bases, self.start, self.turn_density = [], [], {}, 0, None
        self.optimizer.register_refresh_hook(self.events.append)

    def run(self, without=lambda step, place: False):
        """Compare all weights after every step; `without` tells which gradients are missing."""
        for step in range(1, STEPS + 1):
            lr = 0.02 * (1.2 + math.sin(step)) if step != 19 else 0.0
            grads = [None if without(step, i) else g for i, g in enumerate(tensors(seed=1000 + step))]
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            for p, g in zip(self.params, grads, strict=True):
                p.grad = None if g is None else g.clone()
            self.optimizer.step()
            self.select(step, grads)
            for place, (p, g) in enumerate(zip(self.params, grads, strict=True)):
                self.compare(p, g, lr, self.references[place], f"tensor {place}, {tuple(p.shape)}, step {step}")
        assert [e.step for e in self.events if e.event == "refresh"] == list(range(1, STEPS + 1, T))
        assert any(before != after for before, after in itertools.pairwise(self.turns)), "the subspace never moved"
        return self

    def compare(self, param, grad, lr, reference, where):
        state = self.optimizer.state[param]
        if grad is not None:
            basis = state.get("basis") if state.get("entries") else None
            reference.step(grad, lr, basis, side_of((*param.shape, 1), self.side))
        wanted = torch.tensor(reference.weights, dtype=torch.float64)
        off = (wanted - torch.atleast_2d(param.detach())).abs().max().item()
        assert off < (1e-9 if self.kind in PROJECTIONS else 1e-12), f"off by {off}: {where}"

    def density(self, step):
        if not isinstance(self.fall, tuple):
            return self.fall
        start, end, steps = self.fall
        return max(end, start - (start - end) * min(1, step / steps))

    def select(self, step, grads):
        """Let the reference follow the optimizer's selection, after checking that it is one that ought to be."""
        states = [self.optimizer.state[p] for p in self.params[: len(SHAPES)]]
        pairs = zip(states, SHAPES, strict=True)
        units = [units_in(state, self.kind, shape, self.side) for state, shape in pairs]
        refreshes = (step - 1) % T == 0
        if refreshes:
            had = [bool(reference.units) for reference in self.references[: len(SHAPES)]]
            self.start += sum(had) // (2 if self.described.get("unit") == "layer" else 1)
            self.turns.append([s["basis"].tolist() if "basis" in s else u for s, u in zip(states, units, strict=True)])
        if refreshes or self.settings["shrink"] == "immediately":
            self.turn_density = self.density(step)
        self.check(states, units, refreshes, grads)
        policy = self.settings["on_refresh"] if refreshes else "keep_overlap"  # between refreshes some are given up
        for reference, now in zip(self.references, units, strict=False):
            assert refreshes or all(unit in reference.units for unit in now)
            reference.choose(now, policy)
        for reference in self.references[len(SHAPES) :] if policy == "reset_all" else ():
            reference.choose(reference.units, policy)

    def check(self, states, units, refreshes, grads):
        if self.kind == "blocks":
            check_blocks([bool(u) for u in units], self.turn_density, self.start, **self.described)
            return
        for state, now, shape, grad in zip(states, units, SHAPES, grads, strict=False):
            least = how_many(self.kind, shape, self.turn_density, self.side)
            lazy = self.kind == "randk" and not refreshes  # it gives entries up when 1/64 of them have to go
            most = how_many(self.kind, shape, self.turn_density * 64 / 63, self.side) if lazy else least
            assert least <= len(now) <= most
            assert all(a < b for a, b in itertools.pairwise(now)), "not sorted"
            assert state["entries"] == sum(map(len, now))
            if "basis" not in state or not state["entries"]:
                continue
            if refreshes:
                side = side_of(shape, self.side)
                assert len(state["basis"]) == shape[side == "right"]
                check_basis(state["basis"], self.kind, side, grad)
            else:
                assert torch.equal(state["basis"], self.bases[shape][:, : len(now)])
            self.bases[shape] = state["basis"].clone()


# -- the cases ----------------------------------------------------------------------------------------------------

PROJECTIONS = ["svd", "random"]
KINDS = ["blocks", "columns", "rows", "slab", "randk", "randperm", *PROJECTIONS]
KINDS_AND_POLICIES = [(kind, policy) for kind in KINDS for policy in POLICIES[kind]]
FALL = (0.9, 0.1, 20)


def free_rule(kind):
    """At full rank a residual is rounding noise, and so are its signs."""
    return "sgd" if kind in PROJECTIONS else "signsgd"


@pytest.mark.parametrize("rule", BY_ENTRY)
@pytest.mark.parametrize("state_full", STATE_FULL)
@pytest.mark.parametrize(("kind", "on_refresh"), KINDS_AND_POLICIES)
def test_every_combination(kind, on_refresh, state_full, rule):
    Comparison(subspace=kind, on_refresh=on_refresh, state_full=state_full, state_free=rule).run()


def test_all_rules_have_a_reference():
    assert (BY_ENTRY | OF_MATRICES).keys() == choices.STATE_FREE.keys()


@pytest.mark.filterwarnings("ignore:.*swan trains no matrix of under 2 columns")
@pytest.mark.parametrize("rule", OF_MATRICES)
@pytest.mark.parametrize("kind", ["blocks", "svd"])
def test_rules_that_normalize_matrices(kind, rule):
    Comparison(subspace=kind, state_free=rule, fused=True).run()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_of_ones_own_is_given_all_that_it_sees(kind, rule, fused):
    Comparison(subspace=kind, state_free=rule, fused=fused).run()


@pytest.mark.parametrize(("shrink", "fused"), [("immediately", False), ("at_refresh", False), ("immediately", True)])
@pytest.mark.parametrize(("kind", "on_refresh"), KINDS_AND_POLICIES)
def test_a_falling_density(kind, on_refresh, shrink, fused):
    parts = {"subspace": kind, "on_refresh": on_refresh, "shrink": shrink, "state_free": free_rule(kind)}
    events = Comparison(FALL, fused=fused, **parts).run().events
    assert ("shrink" in {e.event for e in events}) == (shrink == "immediately")


@pytest.mark.parametrize("state_full", ["lion", "sgdm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_falling_density_with_other_rules(kind, state_full):
    policy = "keep_overlap" if kind == "blocks" else "keep"
    Comparison(FALL, subspace=kind, on_refresh=policy, state_full=state_full, state_free=free_rule(kind)).run()


@pytest.mark.parametrize("density", [0.4375, 0.7, FALL])
@pytest.mark.parametrize("match", ["count", "elements"])
@pytest.mark.parametrize("unit", ["matrix", "layer"])
@pytest.mark.parametrize("order", ["descending", "ascending", "mirror", "random"])
def test_blocks(order, unit, match, density):
    subspace = {"kind": "blocks", "order": order, "unit": unit, "match": match}
    Comparison(density, subspace=subspace, on_refresh="keep_overlap").run()


@pytest.mark.parametrize("density", [0.3, FALL])
@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_sides_of_projections(kind, side, on_refresh, density):
    Comparison(density, subspace={"kind": kind, "side": side}, on_refresh=on_refresh, state_free="sgd").run()


@pytest.mark.parametrize(("decay", "s", "c"), [(0.0, 1.0, 1.0), (0.5, 1.0, 0.1), (0.5, 0.25, 1.0), (0.5, 0.0, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_rates(kind, decay, s, c):
    Comparison(subspace=kind, weight_decay=decay, split_lr_scale=s, state_free_lr_scale=c).run()


@pytest.mark.parametrize(("kind", "on_refresh"), [case for case in KINDS_AND_POLICIES if case[0] != "svd"])
def test_tensors_without_a_gradient_are_skipped_alone(kind, on_refresh):
    def without(step, place):
        return (step + place) % 5 == 0 or (place == 2 and 8 <= step <= 17)

    Comparison(subspace=kind, on_refresh=on_refresh).run(without)
