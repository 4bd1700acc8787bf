import pytest
import torch

from adafrugal.optim.subspaces import SUBSPACES, Blocks, Columns, Matrix, Turn, subspace


def shapes(n):
    return [Matrix(f"layers.{i}.weight", torch.Size([2, 3])) for i in range(n)]


def draw(share, matrix=None, place=0):
    """Columns of a matrix at a share, always of the same turn."""
    matrix = torch.zeros(4, 20) if matrix is None else matrix
    return Columns().select(matrix, None, share, Turn(3, 5).generator(place), {})


@pytest.mark.parametrize("density", [0.0, 0.05, 0.25, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_blocks_are_counted_with_pythons_half_to_even(order, density):
    shares = Blocks(order).shares(shapes(28), density, Turn(seed=0, number=3, start=5))
    assert set(shares) <= {0.0, 1.0}
    assert sum(shares) == round(density * 28)
    assert sum(Blocks(order).shares(shapes(10), 0.25, Turn(0, 1))) == 2  # 2.5 rounds to 2


def test_descending_starts_at_the_last_matrix_and_ascending_at_the_first():
    turn = Turn(seed=0, number=1, start=0)
    assert Blocks("descending").shares(shapes(8), 0.25, turn) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert Blocks("ascending").shares(shapes(8), 0.25, turn) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert Blocks("descending").shares(shapes(8), 0.25, Turn(0, 4, 7)) == [1, 0, 0, 0, 0, 0, 0, 1], "it wraps"


@pytest.mark.parametrize("n", [1, 7, 28, 29])
@pytest.mark.parametrize("density", [0.05, 0.25, 0.3, 0.7])
def test_over_a_cycle_every_block_has_its_turn_as_often_as_any_other(n, density):
    turns, start = torch.zeros(n), 0
    for number in range(1, 60):
        shares = Blocks("descending").shares(shapes(n), density, Turn(0, number, start))
        start += int(sum(shares))
        turns += torch.tensor(shares)
        assert turns.max() - turns.min() <= 1


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_a_lower_density_selects_a_part_of_what_a_higher_one_does(order):
    turn = Turn(seed=1, number=2, start=11)
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
    fewer = columns.shrink(matrix.shape, 0.25, Turn(3, 5).generator(0), more)
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
        return tuple(torch.rand(4, generator=Turn(**{"seed": 0, "number": 1} | turn).generator(place)).tolist())

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


def test_the_schema_of_settings_knows_every_subspace_and_its_settings():
    from dataclasses import fields

    from adafrugal.config import SUBSPACES as SCHEMA

    assert {kind: {f.name for f in fields(s)} for kind, s in SUBSPACES.items()} == {
        kind: set(allowed) for kind, allowed in SCHEMA.items()
    }
    for kind, settings in SCHEMA.items():
        for name, values in settings.items():
            for value in values:
                subspace({"kind": kind, name: value})
