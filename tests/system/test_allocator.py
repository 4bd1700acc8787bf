"""How torch takes a GPU's memory is set before CUDA begins, and left to who has set it."""

import os
import sys

import pytest

from adafrugal.system import allocator

OLD = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}), ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
    ({OLD: "max_split_size_mb:128"}, {OLD: "max_split_size_mb:128"}),
])  # fmt: skip
def test_what_the_environment_says_counts(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(sys, "platform", "linux")
    allocator.grow_segments()
    assert os.environ == expected
    assert allocator.configured() == next(iter(expected.values()))


def test_other_systems_have_no_such_segments(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "platform", "win32")
    allocator.grow_segments()
    assert allocator.configured() is None
