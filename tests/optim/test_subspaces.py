import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adafrugal.optim import Frugal, choices, rules
from adafrugal.optim.subspaces import SUBSPACES, Blocks, Columns, Matrix, Period, subspace


def shapes(n):
    return [Matrix(f"layers.{i}.weight", torch.Size([2, 3])) for i in range(n)]


def draw(share, matrix=None, place=0):
    """Columns of a matrix at a share, always of the same turn."""
    matrix = torch.zeros(4, 20) if matrix is None else matrix
    return Columns().select(matrix, None, share, Period(3, 5).generator(place), {}, place)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.25, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_blocks_are_counted_with_pythons_half_to_even(order, density):
    shares = Blocks(order).shares(shapes(28), density, Period(seed=0, number=3, start=5))
    assert set(shares) <= {0.0, 1.0}
    assert sum(shares) == round(density * 28)
    assert sum(Blocks(order).shares(shapes(10), 0.25, Period(0, 1))) == 2  # 2.5 rounds to 2


def test_descending_starts_at_the_last_matrix_and_ascending_at_the_first():
    turn = Period(seed=0, number=1, start=0)
    assert Blocks("descending").shares(shapes(8), 0.25, turn) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert Blocks("ascending").shares(shapes(8), 0.25, turn) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert Blocks("descending").shares(shapes(8), 0.25, Period(0, 4, 7)) == [1, 0, 0, 0, 0, 0, 0, 1], "it wraps"


@pytest.mark.parametrize("n", [1, 7, 28, 29])
@pytest.mark.parametrize("density", [0.05, 0.25, 0.3, 0.7])
def test_over_a_cycle_every_block_has_its_turn_as_often_as_any_other(n, density):
    turns, start = torch.zeros(n), 0
    for number in range(1, 60):
        shares = Blocks("descending").shares(shapes(n), density, Period(0, number, start))
        start += int(sum(shares))
        turns += torch.tensor(shares)
        assert turns.max() - turns.min() <= 1


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_a_lower_density_selects_a_part_of_what_a_higher_one_does(order):
    turn = Period(seed=1, number=2, start=11)
    before = [1.0] * 28
    for density in (0.9, 0.6, 0.3, 0.1, 0.0):
        now = Blocks(order).shares(shapes(28), density, turn)
        assert all(a >= b for a, b in zip(before, now, strict=True))
        before = now


@pytest.mark.parametrize("shape", [(3, 10), (10, 3), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_columns_are_counted_down_to_whole_ones(shape, share):
    columns, matrix = Columns(), torch.zeros(shape)
    count = columns.entries(matrix.shape, share)
    assert count == shape[0] * int(share * shape[1])
    if count:
        indices = draw(share, matrix)["indices"]
        assert indices.numel() * shape[0] == count
        assert torch.equal(indices, indices.unique()), "sorted, no column twice"


def test_columns_shrink_to_a_part_of_themselves_and_what_stays_keeps_its_values():
    columns, matrix = Columns(), torch.randn(4, 20)
    more = draw(0.6)
    fewer = columns.shrink(matrix.shape, 0.25, Period(3, 5).generator(0), more)
    assert set(fewer["indices"].tolist()) < set(more["indices"].tolist())
    assert fewer["indices"].numel() == 5
    assert torch.equal(
        columns.narrow(matrix[:, more["indices"]], matrix.shape, more, fewer), matrix[:, fewer["indices"]]
    )


def test_columns_are_closed_into_their_places_and_nothing_else_is_touched():
    columns, matrix, grad = Columns(), torch.randn(4, 20), torch.randn(4, 20)
    selection = draw(0.5)
    regions = columns.regions(matrix, grad, selection)
    target, direction = regions.full
    assert torch.equal(direction, grad[:, selection["indices"]])
    written = matrix.clone()
    columns.close(written, target + 1, selection)
    inside = torch.zeros(20, dtype=torch.bool)
    inside[selection["indices"]] = True
    assert torch.equal(written[:, inside], matrix[:, inside] + 1)
    assert torch.equal(written[:, ~inside], matrix[:, ~inside])


def test_a_turn_draws_the_same_again_and_every_other_turn_place_and_group_otherwise():
    def numbers(place=None, **turn):
        return tuple(torch.rand(4, generator=Period(**{"seed": 0, "number": 1} | turn).generator(place)).tolist())

    assert numbers() == numbers()
    assert numbers(place=2, first=1) == numbers(place=0, first=3), "a matrix is known by its place among all"
    others = [numbers(), numbers(seed=1), numbers(number=2), numbers(first=1), numbers(place=0), numbers(place=1)]
    assert len(set(others)) == 6


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
    assert tuple(rules.STATE_FREE) == choices.NAMES["state_free"]
    defaults = {name: p.default for name, p in inspect.signature(Frugal).parameters.items()}
    assert {name: defaults[name] for name in choices.NAMES} == {name: n[0] for name, n in choices.NAMES.items()}


# -- properties -------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
DENSITIES = st.floats(0, 1)
EVERYWHERE = ["columns", "rows", "slab", "randk", "randperm"]  # subspaces of coordinates in each matrix
WITH_DIRECTIONS = [*EVERYWHERE, "svd", "random", {"kind": "svd", "svd_method": "randomized"},
                   {"kind": "random", "side": "left"}, {"kind": "svd", "side": "right"}]  # fmt: skip


def chosen(kind, matrix, share, number=1, old=None, place=0):
    grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
    return subspace(kind).select(matrix, grad, share, Period(3, number).generator(0), old or {}, place)


@pytest.mark.parametrize("kind", WITH_DIRECTIONS, ids=str)
@given(SHAPES, DENSITIES)
@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("kind", EVERYWHERE)
@given(SHAPES, DENSITIES)
@settings(max_examples=60, deadline=None)
def test_no_entry_is_updated_by_both_rules_and_every_entry_by_one(kind, shape, share):
    space, matrix = subspace(kind), torch.zeros(shape)
    if not space.entries(matrix.shape, share):
        return
    selection = chosen(kind, matrix, share)
    regions = space.regions(matrix, torch.ones(shape), selection)
    regions.full[0].add_(10.0)
    for free in regions.free:
        free.target.add_(free.grad * (1.0 if free.scale is None else free.scale))
    space.close(matrix, regions.full[0], selection)
    full, free = (matrix == 10.0).sum().item(), (matrix == 1.0).sum().item()
    assert full == space.entries(matrix.shape, share)
    assert full + free == matrix.numel()


@pytest.mark.parametrize("kind", EVERYWHERE)
@given(SHAPES, DENSITIES)
@settings(max_examples=60, deadline=None)
def test_what_is_taken_out_and_put_back_is_what_was_there(kind, shape, share):
    space, matrix = subspace(kind), torch.randn(shape)
    if not space.entries(matrix.shape, share):
        return
    selection = chosen(kind, matrix, share)
    gathered = space.regions(torch.zeros(shape), matrix, selection).full[1]
    empty = torch.zeros(shape)
    target = space.regions(empty, matrix, selection).full[0]
    target.copy_(gathered)
    space.close(empty, target, selection)
    assert torch.equal(empty, torch.where(empty != 0, matrix, 0.0))
    assert (empty != 0).sum() == space.entries(matrix.shape, share)


@pytest.mark.parametrize("kind", WITH_DIRECTIONS, ids=str)
@given(SHAPES, st.lists(DENSITIES, min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_it_shrinks_to_a_part_of_itself_however_often(kind, shape, shares):
    space, matrix = subspace(kind), torch.randn(shape)
    selection = None
    for share in sorted(shares, reverse=True):
        if not space.entries(matrix.shape, share):
            return
        if selection is None:
            selection = chosen(kind, matrix, share)
            continue
        fewer = space.shrink(matrix.shape, share, Period(3, 1).generator(0), selection)
        before, after = (set(space.positions(matrix.shape, s).tolist()) for s in (selection, fewer))
        assert after <= before
        grad = torch.randn(shape)
        compact = space.regions(matrix, grad, selection).full[1]
        assert torch.allclose(
            space.narrow(compact, matrix.shape, selection, fewer), space.regions(matrix, grad, fewer).full[1], atol=1e-6
        )
        selection = fewer
        assert len(after) * compact.numel() == space.entries(matrix.shape, share) * len(before)


@given(st.integers(1, 40), DENSITIES, st.integers(0, 99), st.sampled_from(["descending", "ascending", "mirror"]))
@settings(max_examples=200, deadline=None)
def test_over_any_cycle_blocks_have_their_turns_alike(n, density, start, order):
    turns = torch.zeros(n)
    for number in range(2 * n):
        shares = Blocks(order).shares(shapes(n), density, Period(0, number + 1, start))
        start += sum(map(bool, shares))
        turns += torch.tensor(shares)
        assert turns.max() - turns.min() <= 1
        assert sum(shares) == round(density * n)


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
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("hidden", "between", "layers"), [(512, 1376, 8), (768, 2048, 12), (2048, 5461, 24)])
def test_parts_of_the_rows_have_about_as_many_entries_of_slabs(hidden, between, layers, ranks, share, above):
    """Of LLaMA's matrices divided by rows, over twelve turns: the most that one part has above the mean."""
    of_a_layer = [(hidden, hidden)] * 4 + [(between, hidden)] * 2 + [(hidden, between)]
    matrices = [torch.empty(shape, device="meta") for shape in of_a_layer * layers]
    numbers = [sum(other.shape == m.shape for other in matrices[:i]) for i, m in enumerate(matrices)]
    olds = [{} for _ in matrices]
    for _ in range(12):
        parts = [0] * ranks
        for i, matrix in enumerate(matrices):
            olds[i] = subspace("slab").select(matrix, None, share, torch.Generator(), olds[i], numbers[i])
            first, end = olds[i]["start"], olds[i]["start"] + olds[i]["rows"]
            for rank in range(ranks):
                lowest, highest = (edge * -(-len(matrix) // ranks) for edge in (rank, rank + 1))
                parts[rank] += max(0, min(end, highest) - max(first, lowest)) * matrix.shape[1]
        assert max(parts) <= (1 + above) * sum(parts) / ranks


# -- blocks -----------------------------------------------------------------------------------------------------------


def layered(sizes_of_layers):
    return [
        Matrix(f"layers.{i}.{j}", torch.Size([size, 1]), layer=i)
        for i, sizes in enumerate(sizes_of_layers)
        for j, size in enumerate(sizes)
    ]


def test_layers_are_taken_whole_and_counted_down():
    matrices = layered([[1, 2, 3]] * 12)
    shares = Blocks(unit="layer").shares(matrices, 0.25, Period(0, 1))
    assert [m.layer for m, s in zip(matrices, shares, strict=True) if s] == [9] * 3 + [10] * 3 + [11] * 3
    assert Blocks(unit="layer").handed_out(matrices, [bool(s) for s in shares]) == 3
    for layers, expected in ((8, 2), (12, 3), (24, 6)):  # BAdam at 60M, 130M, 350M
        shares = Blocks(unit="layer").shares(layered([[1]] * layers), 0.25, Period(0, 1))
        assert sum(shares) == expected
    with pytest.raises(ValueError, match=r"the layer of layers\.0\.weight is not known; make the groups"):
        Blocks(unit="layer").shares(shapes(3), 0.5, Period(0, 1))


def test_mirror_alternates_between_both_ends_and_leaves_no_middle_out():
    walk = [Blocks("mirror").shares(shapes(5), 0.2, Period(0, 1, start)).index(1.0) for start in range(6)]
    assert walk == [4, 0, 3, 1, 2, 4]


@pytest.mark.parametrize("order", ["descending", "ascending", "mirror", "random"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.25, 0.5, 0.93, 1.0])
def test_matched_by_elements_no_other_number_of_blocks_would_be_nearer(order, density):
    matrices = layered([[1, 1, 1, 1, 4, 4, 4]] * 4)
    total = sum(m.shape.numel() for m in matrices)
    for start in range(9):
        turn = Period(1, 2, start)
        at = {
            d: sum(m.shape.numel() * s for m, s in zip(
                matrices, Blocks(order, match="elements").shares(matrices, d, turn), strict=True))
            for d in (density, *(i / 100 for i in range(101)))
        }  # fmt: skip
        assert all(abs(at[density] - density * total) <= abs(other - density * total) for other in at.values())
        assert sorted(at.values()) == [at[d] for d in sorted(at)], "more with a larger density"


# -- projections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["smaller", "left", "right"])
@pytest.mark.parametrize("kind", ["svd", "random"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1)])
def test_a_basis_is_orthonormal_and_its_side_is_stored(kind, side, shape):
    space, matrix = subspace({"kind": kind, "side": side}), torch.randn(shape)
    for share in (0.3, 0.5, 1.0):
        if not space.entries(matrix.shape, share):
            continue
        selection = chosen(space, matrix, share)
        basis = selection["basis"]
        d = {"left": shape[0], "right": shape[1]}[selection["side"]]
        assert basis.shape == (d, min(round(share * d), *shape))
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
        if side != "smaller":
            assert selection["side"] == side
        elif shape[0] != shape[1]:
            assert d == min(shape)


@pytest.mark.parametrize("method", ["exact", "randomized"])
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


def test_random_directions_differ_between_turns_and_svds_follow_the_gradient():
    matrix = torch.zeros(8, 6)
    one, other = (chosen("random", matrix, 0.5, number)["basis"] for number in (1, 2))
    assert not torch.allclose(one, other)
    assert torch.equal(one, chosen("random", matrix, 0.5, 1)["basis"])


@pytest.mark.parametrize("kind", ["columns", "rows", "randk", "randperm"])
def test_indices_are_sorted_and_none_comes_twice(kind):
    for shape, share in itertools.product([(3, 9), (9, 3), (6, 6)], [0.3, 0.7, 1.0]):
        if subspace(kind).entries(torch.Size(shape), share):
            indices = chosen(kind, torch.zeros(shape), share)["indices"]
            assert torch.equal(indices, indices.unique())
            assert indices.dtype == (torch.int32 if kind == "randk" else torch.int64)
