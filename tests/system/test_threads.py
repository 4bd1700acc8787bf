"""How threads wait is set before torch is there, and left to who has set it."""

import os

import pytest

from adafrugal.system import threads

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"GOMP_SPINCOUNT": threads.SPINS}), ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
])  # fmt: skip
def test_what_the_environment_says_counts(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    threads.wait_asleep()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected
