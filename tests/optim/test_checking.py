"""A subspace of one's own is tried apart from an optimizer: built-in ones pass, and each fault is named."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from stepping import frugal, matrices, stepped

from adafrugal.optim import Regions, check_subspace
from adafrugal.optim.rules import Free
from adafrugal.optim.subspaces import SUBSPACES, Columns, RandK, Slab, Subspace, subspace

MORE = [
    {"kind": "svd", "side": "left"}, {"kind": "svd", "svd_method": "subspace_iteration"},
    {"kind": "blocks", "unit": "layer", "match": "elements"}, {"kind": "blocks", "order": "random"},
]  # fmt: skip


@pytest.mark.parametrize("shape", [(12, 20), (7, 5), (5, 5), (1, 7), (9, 1)])
@pytest.mark.parametrize("value", [*SUBSPACES, *MORE], ids=str)
def test_our_own_subspaces_pass(value, shape):
    check_subspace(subspace(value), shape)


@dataclass(frozen=True)
class Edges(Subspace):
    """The first and the last entries of a matrix, as a user may write it, with nothing but what is needed."""

    kind: ClassVar[str] = "edges"
    remembers: ClassVar[tuple[str, ...]] = ("chosen",)

    def entries(self, shape, share):
        return 2 * int(share * shape.numel() / 2)

    def select(self, param, grad, share, generator, old, place):
        some = self.entries(param.shape, share) // 2
        numbers = torch.arange(param.numel())
        return {"chosen": torch.cat([numbers[:some], numbers[param.numel() - some :]])}

    def shrink(self, shape, share, generator, old):
        some = self.entries(shape, share) // 2
        return {"chosen": torch.cat([old["chosen"][:some], old["chosen"][len(old["chosen"]) - some :]])}

    def positions(self, shape, selection):
        return selection["chosen"]

    def compact(self, shape, selection):
        return selection["chosen"].shape

    def regions(self, param, grad, selection, residual=True):
        chosen = selection["chosen"]
        return Regions((param.take(chosen), grad.take(chosen)), (Free(param, grad),))

    def close(self, param, target, selection):
        param.put_(selection["chosen"], target)


def test_one_that_passes_is_trained_with():
    check_subspace(Edges(), (12, 20))
    check_subspace(Edges(), (3, 7))
    stepped(frugal(matrices(), subspace=Edges(), density={"kind": "linear", "steps": 9}, interval=4), range(12))


class Off(Columns):
    def entries(self, shape, share):
        return super().entries(shape, share) - 1


class Half(Edges):
    def positions(self, shape, selection):
        raise NotImplementedError


class Unsorted(Columns):
    def _drawn(self, shape, share, generator):
        return super()._drawn(shape, share, generator).flip(0)


class Global(Columns):
    def _drawn(self, shape, share, generator):
        return super()._drawn(shape, share, torch.default_generator)


class Misnamed(Edges):
    remembers = ("indices",)


class Twice(Slab):
    def regions(self, param, grad, selection, residual=True):
        return Regions(super().regions(param, grad, selection).full, (Free(param, grad),))


class Copies(Slab):
    def regions(self, param, grad, selection, residual=True):
        full, free = super().regions(param, grad, selection)
        return Regions((full[0].clone(), full[1]), free)


class Grows(Slab):
    def shrink(self, shape, share, generator, old):
        return {"start": (old["start"] + 3) % shape[0], "rows": int(share * shape[0])}


class Spoils(RandK):
    def select(self, param, grad, share, generator, old, place):
        grad.zero_()
        return super().select(param, grad, share, generator, old, place)


class Never(Edges):
    def entries(self, shape, share):
        return 0


class Keeps(Edges):
    def select(self, param, grad, share, generator, old, place):
        return {"chosen": [0, 1]}


class Counts(Slab):
    numbers = ()


class Unnumbered(Slab):
    numbers = ()


class Unfinished(Edges):
    shrink = Subspace.shrink


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Off(), r"Off: regions gives the state-full rule a target of shape \[12, 20\] .* needed: 239 entries"),
        (Half(), "Half.positions raises NotImplementedError: without a word"),
        (Unsorted(), r"Unsorted: positions is \[.*needed: 20 numbers, ascending"),
        (Global(), "Global: select draws from torch's global generator"),
        (Misnamed(), r"Misnamed: select returns \['chosen'\] and remembers is \('indices',\)"),
        (Twice(), "Twice: by regions and close entry .* does not move by its gradient"),
        (Copies(), "Copies: in_place is True, but regions gives the state-full rule a copy"),
        (Grows(), "Grows: shrink selects what was not selected"),
        (Spoils(), "Spoils: select changes the matrix or its gradient"),
        (Never(), "Never: entries is 0 for a whole matrix"),
        (Keeps(), "Keeps: chosen in the selection is a list"),
        (Counts(), r"Counts: start in the selection is a int and numbers is \(\)"),
        (Unnumbered(), "Unnumbered: start in the selection is a int and numbers is"),
        (Unfinished(), "Unfinished.shrink raises NotImplementedError: Unfinished defines no shrink"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_is_named_with_what_is_needed(wrong, says):
    with pytest.raises(ValueError, match=says):
        check_subspace(wrong)


def test_a_class_that_lacks_a_method_is_refused_when_it_is_used():
    class Nothing(Subspace):
        kind = "nothing"

    with pytest.raises(TypeError, match=r"entries.*regions.*select"):
        Nothing()


def test_a_state_with_a_subspace_of_ones_own_says_how_to_read_it():
    saved = stepped(frugal(matrices(), subspace=Edges()), range(2)).state_dict()
    with pytest.raises(ValueError, match=r"'edges'; allowed: blocks, .* or one of your own \(see register\)"):
        frugal(matrices()).load_state_dict(saved)
    other = frugal(matrices(), subspace=Edges())
    other.load_state_dict(saved)
    assert other.param_groups[0]["subspace"] == Edges()
