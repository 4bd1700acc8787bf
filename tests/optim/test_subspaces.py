import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adafrugal.optim import Frugal, choices, rules
from adafrugal.optim.subspaces import SUBSPACES, Blocks, Matrix, Period, RowRange, subspace


@pytest.mark.parametrize("value", ["blocks", {"kind": "blocks"}, Blocks()])
def test_a_subspace_is_a_name_a_mapping_or_an_object(value):
    assert subspace(value) == Blocks("descending")
    assert subspace(subspace(value).settings()) == subspace(value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("block", "allowed: blocks, columns"),
        ({"kind": "columns", "order": "random"}, "has no 'order'; it has no settings"),
        ({"kind": "blocks", "order": "up"}, "allowed: descending, ascending, mirror, random"),
        (None, "allowed: blocks, columns"),
    ],
)
def test_an_unknown_subspace_is_refused_with_the_known_ones(value, says):
    with pytest.raises(ValueError, match=says):
        subspace(value)


def test_the_first_name_of_each_choice_is_the_default():
    assert {kind: subspace(kind).settings() for kind in SUBSPACES} == {
        kind: {"kind": kind} | {name: names[0] for name, names in settings.items()}
        for kind, settings in choices.SUBSPACES.items()
    }
    assert tuple(rules.STATE_FULL) == tuple(rules.MOMENTS) == choices.NAMES["state_full"]
    defaults = {name: p.default for name, p in inspect.signature(Frugal).parameters.items()}
    assert {name: defaults[name] for name in choices.NAMES} == {name: n[0] for name, n in choices.NAMES.items()}


# -- properties -------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
DENSITIES = st.floats(0, 1)
EVERYWHERE = ["columns", "rows", "slab", "randk", "randperm"]  # subspaces of coordinates in each matrix
WITH_DIRECTIONS = [*EVERYWHERE, "svd", "random", {"kind": "svd", "svd_method": "subspace_iteration"},
                   {"kind": "random", "side": "left"}, {"kind": "svd", "side": "right"}]  # fmt: skip


def chosen(kind, matrix, share, number=1, old=None, place=0):
    grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
    return subspace(kind).select(matrix, grad, share, Period(3, number).generator(0), old or {}, place)


@pytest.mark.parametrize("kind", WITH_DIRECTIONS, ids=str)
@given(SHAPES, DENSITIES)
@settings(max_examples=40, deadline=None)
def test_what_is_selected_has_the_size_that_was_promised(kind, shape, share):
    space, matrix = subspace(kind), torch.randn(shape)
    entries = space.entries(matrix.shape, share)
    assert 0 <= entries <= matrix.numel()
    if entries:
        selection = chosen(kind, matrix, share)
        assert set(selection) == set(space.remembers)
        target, direction = space.regions(matrix, matrix.clone(), selection).full
        assert target.shape == direction.shape
        assert target.numel() == entries
        assert target.shape[space.axis(matrix.shape)] == len(space.positions(matrix.shape, selection))
    assert space.entries(matrix.shape, 0.0) == 0
    if isinstance(kind, str):  # a side of one's own choice has at most as many directions as the smaller one
        assert space.entries(matrix.shape, 1.0) == matrix.numel()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_a_slab_goes_over_every_row_in_a_cycle(n, rows, place):
    rows, matrix, old, covered = min(rows, n), torch.zeros(n, 2), {}, []
    share = rows / n if int(rows / n * n) == rows else (rows + 0.5) / n
    for number in range(2 * -(-n // rows)):  # it may begin in the middle
        old = chosen("slab", matrix, share, number + 1, old, place)
        assert 0 <= old["start"] <= n - rows
        covered += range(old["start"], old["start"] + old["rows"])
    assert set(covered) == set(range(n))


@pytest.mark.parametrize(("share", "above"), [(0.25, 0.02), (0.05, 0.09), (0.1, 0.14), (0.3, 0.12)])
@pytest.mark.parametrize(("hidden", "between", "layers"), [(512, 1376, 8), (768, 2048, 12), (2048, 5461, 24)])
def test_parts_of_the_rows_have_about_as_many_entries_of_slabs(hidden, between, layers, share, above):
    """For LLaMA's matrices in 2 and 4 parts by rows, over twelve refreshes: the most that a part has above the mean."""
    slab, shapes = subspace("slab"), {(hidden, hidden): 4, (between, hidden): 2, (hidden, between): 1}  # of a layer
    parts = {(ranks, refresh): [0] * ranks for ranks in (2, 4) for refresh in range(12)}
    for shape, count in shapes.items():
        matrix = torch.empty(shape, device="meta")
        for place in range(count * layers):
            old = {}
            for refresh in range(12):
                old = slab.select(matrix, None, share, torch.Generator(), old, place)
                for ranks in (2, 4):
                    each = -(-shape[0] // ranks)
                    for rank in range(ranks):
                        rows = RowRange(rank * each, each).common(RowRange(old["start"], old["rows"]))
                        parts[ranks, refresh][rank] += rows.count * shape[1]
    assert all(max(found) <= (1 + above) * sum(found) / ranks for (ranks, _), found in parts.items())


def test_blocks_of_layers_need_the_layers():
    with pytest.raises(ValueError, match=r"the layer of layers\.0\.weight is not known; make the groups"):
        Blocks(unit="layer").shares([Matrix("layers.0.weight", torch.Size([2, 3]))], 0.5, Period(0, 1))


# -- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "subspace_iteration"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_svd_finds_the_leading_directions(method, shape):
    torch.manual_seed(0)
    signal = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    grad = (signal + 0.01 * torch.randn(shape)).bfloat16()
    state = torch.get_rng_state()
    space = subspace({"kind": "svd", "svd_method": method})
    selection = space.select(grad, grad, 0.1, Period(0, 1).generator(0), {}, 0)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    (_, compact), ((_, residual, _),) = space.regions(grad.float(), grad.float(), selection)
    assert compact.norm() > 0.999 * grad.float().norm()
    assert residual.norm() < 0.02 * grad.float().norm()
    torch.testing.assert_close(compact.norm() ** 2 + residual.norm() ** 2, grad.float().norm() ** 2)


def gradients_of_a_network_that_learns(seed):
    """The gradient of a layer of 48 × 64 at steps 0, 20, 40 and 60, which learns which of 300 words follows which."""
    torch.manual_seed(seed)
    usual = torch.randint(300, (300, 3))
    model = torch.nn.Sequential(
        torch.nn.Embedding(300, 48), torch.nn.Linear(48, 64), torch.nn.Tanh(), torch.nn.Linear(64, 300)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(61):
        model.zero_grad()
        words = (300 * torch.rand(256) ** 3).long()  # some are frequent
        following = usual[words, torch.randint(3, (256,))]
        torch.nn.functional.cross_entropy(model(words), following).backward()
        if step % 20 == 0:
            yield model[1].weight.grad.clone()
        optimizer.step()


@pytest.mark.parametrize(("rounds", "least", "usually"), [(1, 0.8, 0.87), (2, 0.9, 0.95)])
def test_subspace_iteration_captures_nearly_what_the_exact_basis_does_at_first_and_later(rounds, least, usually):
    exact = subspace("svd")
    iterated = subspace({"kind": "svd", "svd_method": "subspace_iteration", "rounds": rounds})

    def energy(grad, chosen):
        return float(iterated.project(grad, chosen).norm() ** 2)

    shares = []
    for seed in range(8):
        old = {}
        for step, grad in enumerate(gradients_of_a_network_that_learns(seed)):
            best, new = (s.select(grad, grad, 0.25, Period(0, step).generator(0), old, 0) for s in (exact, iterated))
            torch.testing.assert_close(new["basis"].T @ new["basis"], torch.eye(12), rtol=0, atol=1e-5)
            assert not old or energy(grad, new) > 1.5 * energy(grad, old)  # the basis before is stale
            shares.append(energy(grad, new) / energy(grad, best))
            old = new
    each = torch.tensor(shares).view(8, 4)
    assert each.min() > least, each
    assert (each.mean(0) > usually).all(), each.mean(0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_projected_as_each_of_its_matrices(side):
    torch.manual_seed(0)
    space = subspace({"kind": "random", "side": side})
    grads = torch.randn(3, 12, 20)
    chosen = [space.select(grad, grad, 0.25, Period(0, 1).generator(i), {}, i) for i, grad in enumerate(grads)]
    batch = {"basis": torch.stack([each["basis"] for each in chosen])}
    compact = space.project(grads, batch)
    back = space.back(compact, batch, grads[0].shape)
    for i, grad in enumerate(grads):
        alone, (free,) = space.regions(torch.zeros_like(grad), grad, chosen[i])
        torch.testing.assert_close(compact[i], alone[1])
        torch.testing.assert_close(grads[i] - back[i], free.grad)
