"""Settings as configuration libraries and numpy give them are saved as plain values."""

import enum
from typing import NamedTuple

import numpy
import omegaconf
import pytest
import torch
from stepping import matrices, parameters, same, saved_and_loaded, stepped

from adafrugal.optim import SVD, Frugal, LinearDecay, LossAware
from adafrugal.optim.values import as_plain


class Rule(str, enum.Enum):  # noqa: UP042, older than StrEnum
    LION = "lion"


class Pair(NamedTuple):
    first: float
    second: float


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (numpy.float32(0.5), 0.5), (numpy.int64(3), 3), (numpy.bool_(True), True), (numpy.arange(3), [0, 1, 2]),
        (omegaconf.OmegaConf.create([0.9, {"a": "${.b}", "b": 1}]), [0.9, {"a": 1, "b": 1}]), (Rule.LION, "lion"),
        (Pair(1.0, numpy.float64(2)), (1.0, 2.0)), (True, True), (None, None), (b"ab", b"ab"),
    ],
    ids=str,
)  # fmt: skip
def test_values_become_pythons_own(given, plain):
    found = as_plain(given)
    assert found == plain
    assert type(found) is type(plain)
    assert not isinstance(plain, tuple | list) or [*map(type, found)] == [*map(type, plain)]


GIVEN = {
    "betas": omegaconf.OmegaConf.create([0.8, 0.95]),
    "lr": numpy.float32(0.5),
    "weight_decay": numpy.float64(0.25),
    "density": omegaconf.OmegaConf.create({"kind": "linear", "start": 0.75, "end": 0.25, "steps": 8}),
    "interval": numpy.int64(3),
    "state_full": Rule.LION,
    "seed": numpy.int32(4),
}


@pytest.mark.parametrize("in_group", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"density": numpy.float32(0.25)},
        {"density": LinearDecay(numpy.float32(0.75), numpy.float64(0.25), numpy.int64(8))},
        {"interval": LossAware(numpy.int64(3), 9, factor=numpy.float32(1.5))},
        {"subspace": SVD(side="right", rounds=numpy.int64(2), svd_method="subspace_iteration"), "state_free": "sgd"},
        {"subspace": omegaconf.OmegaConf.create({"kind": "columns"}), "stagger": numpy.int64(2)},
    ],
    ids=str,
)
def test_what_was_saved_is_read_with_weights_only_and_goes_on(more, in_group):
    given = GIVEN | more
    group, arguments = (given, {}) if in_group else ({}, given)
    optimizer = stepped(Frugal([{"params": matrices(), "split": True, **group}], **arguments), range(4))
    optimizer.observe(numpy.float32(3.0))
    optimizer.param_groups[0]["lr"] = numpy.float64(0.125)  # as a scheduler with a function of numpy's leaves it
    again = Frugal([{"params": [torch.nn.Parameter(p.detach().clone()) for p in parameters(optimizer)], "split": True}])
    again.load_state_dict(saved_and_loaded(optimizer))
    assert again.param_groups[0]["betas"] == (0.8, 0.95)
    assert same(*(parameters(stepped(each, range(4, 9))) for each in (optimizer, again)))
